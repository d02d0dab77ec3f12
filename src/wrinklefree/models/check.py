"""Checks that a folder holds a whole causal language model, before time and memory are spent on loading it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.models.headers import FLOATS, Header, Stored, read_header, weight_files
from wrinklefree.packed.check import PackedSection
from wrinklefree.packed.quantizer import QUANT_METHOD

LARGEST_CONFIG = 1 << 24  # bytes; a packed folder names each layer in it, 250 bytes each

LARGEST_SIZE = 2**26  # of a width, a vocabulary or a number of positions

# Of a folder's JSON files, those that transformers reads. Others, such as a log, may hold anything.
READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "chat_template.json"),
)

# Keys of a config that count parts of a model: at least one tensor each. `max_window_layers` is a limit.
# Numbers of layers. Gemma 3n and 4 have a `hidden_size_per_layer_input`, which is a width.
COUNTS = re.compile(r"^(?!max_|.*_per_layer_)(.*_)?layers?(_|$)|^num_blocks$")

SIZES = re.compile(r"(^|_)(size|dim|heads?|experts?|positions?|embeddings?|embd|inner|rank|channels|ctx|width)(_|$)")

# Numbers of a generation config.
SAMPLING = frozenset(
    [
        "temperature",
        "top_k",
        "top_p",
        "top_h",
        "min_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "encoder_repetition_penalty",
        "diversity_penalty",
        "penalty_alpha",
        "guidance_scale",
        "epsilon_cutoff",
        "eta_cutoff",
        "max_time",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
    ]
)

# Switches of a generation config or a model's config.
SWITCHES = frozenset(
    {"do_sample", "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits"}
    | {"return_dict", "return_dict_in_generate", "renormalize_logits", "remove_invalid_values"}
)


@dataclass(frozen=True)
class Contents:
    """What the files of a folder say that they hold."""

    folder: Path
    config: dict[str, Any]
    header: Header  # empty if the weights are in pytorch_model*.bin, which cannot be checked without loading
    packed: PackedSection | None  # None if this is no packed folder


def check_folder(folder: Path) -> Contents:
    """Check a folder's JSON files and the headers of its weights.

    Raises UserError if `folder` is not a whole causal language model, or if this version cannot read it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: a model is a folder, this is a file")
    config = read_model_config(folder)
    check_causal(folder, config)
    for file in (folder / name for name in READ if (folder / name).is_file()):
        values = read_json(file)
        if file.name in ("config.json", "generation_config.json"):
            _check_generation(file, values)
    header: Header = {}
    for file in weight_files(folder):
        header |= read_header(file)
    if header:
        check_sizes(folder / "config.json", config, len(header))
    return Contents(folder, config, header, _packed_section(folder, config, header))


def refuse_packed(folder: Path | None) -> None:
    """Raises UserError if a training would start from a packed folder, whose weights are codes. None is a hub id."""
    if folder is None or not (folder / "config.json").is_file():
        return
    values = read_model_config(folder).get("quantization_config")
    if isinstance(values, dict) and values.get("quant_method") == QUANT_METHOD:
        raise UserError(
            f"{folder}: a packed folder, which runs but cannot be trained: give the model it was made from, "
            f"or training.start_from with the final/ of its run"
        )


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json. Raises UserError if it is missing or broken, or names files elsewhere."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: no config.json, so not a model folder; give a folder that save_pretrained or wf wrote"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: an adapter of another model (adapter_config.json): merge it into that model first")
    config = read_json(file, LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a model config")
    if config.get("transformers_weights"):
        raise UserError(f"{file}: transformers_weights={config['transformers_weights']!r}: another file of weights")
    return config


def check_causal(folder: Path, config: dict[str, Any]) -> None:
    """Raises UserError if `config`, the config.json of `folder`, does not name a causal LM of transformers."""
    architectures = config.get("architectures") or []
    if config.get("auto_map") and "quantization_config" not in config:
        return  # the model brings its own code, so only transformers can tell
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'}: no model_type, so not a transformers model")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UserError(f"{folder / 'config.json'}: architectures={str(architectures)[:99]}: not a list of names")
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        what = ", ".join(architectures) or "a model without architectures in its config.json"
        raise UserError(f"{folder}: {what}, not a causal language model")


def _check_generation(file: Path, values: Any) -> None:
    """Raises UserError if what generation reads has another type: transformers checks it when it is used."""
    if not isinstance(values, dict):
        raise UserError(f"{file}: not a list of settings by name")
    for key, value in values.items():
        ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
        if key.endswith("_token_id") and not all(map(_is_token, ids)):
            raise UserError(f"{file}: {key}={str(value)[:99]!r} is no token")
        if key in SWITCHES and not (value is None or isinstance(value, bool)):
            raise UserError(f"{file}: {key}={str(value)[:99]!r} is neither true nor false")
        if key in SAMPLING and not (value is None or (isinstance(value, (int, float)) and math.isfinite(value))):
            raise UserError(f"{file}: {key}={str(value)[:99]!r} is no number")


def _is_token(value: Any) -> bool:
    return value is None or (type(value) is int and -1 <= value < 2**31)


def check_sizes(file: Path, config: dict[str, Any], num_tensors: int) -> None:
    """Raises UserError if a config counts more layers than the files have tensors, or has an impossible size."""
    for key, value in _whole_numbers(config):
        if COUNTS.search(key) and value > num_tensors:
            raise UserError(f"{file}: {key}={value}, but the files have {num_tensors} tensors in all")
        if SIZES.search(key) and value > LARGEST_SIZE:
            raise UserError(f"{file}: {key}={value}: no model has such a size")


def _whole_numbers(values: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every whole number of a config and of the configs inside it, with its key."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from _whole_numbers(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:
            yield key, int(value)


def _packed_section(folder: Path, config: dict[str, Any], header: Header) -> PackedSection | None:
    """Read a packed folder's section of config.json, and compare it with the headers.

    Returns None for other folders. Raises UserError if they differ.
    """
    values = config.get("quantization_config") or {}
    if not isinstance(values, dict):
        raise UserError(f"{folder / 'config.json'}: quantization_config is no object")
    if values.get("quant_method") != QUANT_METHOD:
        return None
    section = PackedSection(folder, values)
    for fqn in section.layers:
        spec, _ = section.spec(fqn)
        wanted = {"weight": Stored("U8", spec.packed_shape)}
        wanted |= {name: Stored("F16", shape) for name, shape in spec.tensors.items()}
        for name, expected in wanted.items():
            stored = header.get(f"{fqn}.{name}")
            if stored is None:
                raise UserError(f"{folder}: {fqn}.{name} is missing: export the model again")
            if stored != expected:
                raise UserError(f"{folder}: {fqn}.{name} is {stored}, config.json says {expected}")
    return section


def check_shapes(contents: Contents, skeleton: PreTrainedModel) -> None:
    """Compare a model on the meta device, made from config.json, with the files' headers.

    transformers would fill tensors that do not fit with random numbers, in memory, before it says so.
    Raises UserError if a tensor has another shape or no floating-point numbers, or if most of the model is missing.
    """
    wanted = {name: list(parameter.shape) for name, parameter in skeleton.named_parameters()}
    if contents.packed is not None:
        turned = {f"{fqn}.weight" for fqn, module in skeleton.named_modules() if isinstance(module, Conv1D)}
        wanted = {name: shape[::-1] if name in turned else shape for name, shape in wanted.items()}  # as [out, in]
        wanted = _without_packed(contents.folder, contents.packed, wanted)
    for name in sorted(wanted.keys() & contents.header.keys()):
        stored = contents.header[name]
        if stored.shape != wanted[name]:
            raise UserError(
                f"{contents.folder}: transformers cannot load it: {name} is {stored.shape} in the files, "
                f"{wanted[name]} by config.json"
            )
        if stored.dtype not in FLOATS:
            raise UserError(f"{contents.folder}: {name} is {stored.dtype}, not floating-point numbers")
    needed = sum(map(math.prod, wanted.values()))
    held = sum(math.prod(stored.shape) for stored in contents.header.values())
    if needed > 4 * held + 10**6:  # room for tensors that are stored once and used by several parts
        raise UserError(f"{contents.folder}: config.json means {needed:,} parameters, the files hold {held:,}")


def _without_packed(folder: Path, section: PackedSection, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
    """The shapes in `wanted` that a packed folder stores as they are.

    Raises UserError if a packed layer has another shape than in the model, or is not in it.
    """
    for fqn, number in section.stacks.items():
        if wanted.get(fqn, [])[:1] != [number]:
            raise UserError(f"{folder}: {fqn} has {number} experts, config.json says {wanted.get(fqn)}")
    for fqn in section.layers:
        shape = wanted.get(f"{fqn}.weight")
        if shape not in (None, list(section.spec(fqn)[0].shape)):
            raise UserError(f"{folder}: {fqn} is packed as {section.spec(fqn)[0].shape}, config.json says {shape}")
    packed = {f"{fqn}.weight" for fqn in (*section.layers, *section.tied)} | section.stacks.keys()
    return {name: shape for name, shape in wanted.items() if name not in packed}
