"""Makes a model folder of a GGUF file, once, in the cache: packed to run, or in floating point to train from.

| type in the file | in a packed folder |
|---|---|
| Q1_0, TQ1_0, TQ2_0, Q2_0, Q4_0 | the same integers and scales, for the native kernels |
| Q8_0 | the same integers and scales; the native kernels round them to one scale per row |
| F32, F16, BF16 and every other type | decoded, in bf16 |

Scales that are equal along a row are stored once. `transformers` reads the same folders.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wrinklefree.core.codes import Codes, pack
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.gguf.blocks import INTEGERS, unpack
from wrinklefree.gguf.header import Header, read_header
from wrinklefree.gguf.names import gguf_name, halved, heads_of, own_name
from wrinklefree.gguf.settings import Settings
from wrinklefree.gguf.tokens import has_tokenizer, stop_ids, tokenizer_of
from wrinklefree.gguf.values import read_weight
from wrinklefree.packed.layer import LayerSpec
from wrinklefree.packed.quantizer import QUANT_METHOD, WITH_HEAD
from wrinklefree.training.storage import cache_folder

log = logging.getLogger("wrinklefree")

Use = Literal["packed", "dense"]

VERSION = 1  # of the folders; a new one makes them anew
TABLES = ("Q4_0", "Q8_0")  # types of embeddings that stay integers: their code for 0 is in the middle
PARTS_OF_A_LAYER = 9  # tensors that each layer has at least
IGNORED = ("rope_freqs.weight",)  # read as a setting
WIDTH = {"Q1_0": 1, "TQ1_0": 2, "TQ2_0": 2, "Q2_0": 2, "Q4_0": 4, "Q8_0": 8}  # bits of a packed code


def is_gguf(name: str | Path) -> bool:
    """Whether a name means a GGUF file."""
    return str(name).lower().endswith(".gguf") and Path(name).expanduser().is_file()


def gguf_folder(file: Path, use: Use) -> Path:
    """Return the folder of the model in `file`. The first call writes it. Raises UserError if it cannot be read."""
    header = read_header(file)
    state = file.stat()
    shapes = {name: [t.kind, t.shape, t.offset] for name, t in header.tensors.items()}
    key = fingerprint([VERSION, str(file.resolve()), state.st_size, state.st_mtime_ns, shapes])
    folder = cache_folder() / "gguf" / f"{file.stem}-{use}-{key}"
    if not folder.is_dir():
        contents = _Contents.of(header)
        with written_aside(folder) as aside:
            _write(contents, aside, use)
    log.info("%s: %s; folder %s", file, summary(header, use), folder)
    return folder


def summary(header: Header, use: Use) -> str:
    """Say how many matrices of each type there are, and what runs them."""
    kinds = Counter(tensor.kind for tensor in header.tensors.values() if len(tensor.shape) > 1)
    how = dict.fromkeys(INTEGERS, "native kernels") | {"Q8_0": "native kernels, as int8 with a scale per row"}
    parts = []
    for kind, count in sorted(kinds.items()):
        said = how.get(kind, "decoded to bf16") if use == "packed" else "decoded"
        parts.append(f"{count} {kind} ({said})")
    return ", ".join(parts)


@dataclass(frozen=True)
class _Contents:
    """A file whose tensors are those of the model that its settings describe."""

    header: Header
    arch: str
    config: dict[str, Any]
    skeleton: PreTrainedModel  # on the meta device

    @classmethod
    def of(cls, header: Header) -> "_Contents":
        """Raises UserError if a tensor is missing, unknown, or has another shape than the settings say."""
        settings = Settings(header)
        config = settings.config() | _ends(header)
        if PARTS_OF_A_LAYER * config["num_hidden_layers"] > len(header.tensors):
            raise UserError(
                f"{header.file}: {config['num_hidden_layers']} layers, {len(header.tensors)} tensors in all"
            )
        with refused_in_one_line(f"{header.file}: its settings make no model"), torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
        found = cls(header, settings.arch, config, skeleton)
        found._check()
        return found

    def _check(self) -> None:
        wanted = {name: tuple(p.shape) for name, p in self.skeleton.named_parameters()}
        for theirs, tensor in self.header.tensors.items():
            name = own_name(theirs)
            if theirs not in IGNORED and name not in wanted:
                raise UserError(f"{self.header.file}: {theirs}: a {self.config['model_type']} has no such tensor")
            if name in wanted and tensor.shape != wanted[name]:
                raise UserError(f"{self.header.file}: {theirs} is {tensor.shape}, its settings say {wanted[name]}")
        missing = [name for name in wanted if gguf_name(name) not in self.header.tensors]
        if missing:
            raise UserError(f"{self.header.file}: {gguf_name(missing[0])} is missing ({len(missing)} such tensors)")

    def heads(self, name: str) -> int | None:
        return heads_of(name, self.arch, self.config["num_attention_heads"], self.config["num_key_value_heads"])

    def kind(self, name: str) -> str:
        return self.header.tensors[gguf_name(name) or ""].kind

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        values = read_weight(self.header, name, self.heads(name))
        if not values.isfinite().all():
            raise UserError(f"{self.header.file}: {gguf_name(name)} holds values that are no numbers: it is damaged")
        return values.to(dtype)

    def codes(self, name: str) -> Codes | None:
        """The integers and scales of a matrix as codes of `methods/uniform`, or None for a type without these."""
        theirs = gguf_name(name) or ""
        kind = self.header.tensors[theirs].kind
        if kind not in INTEGERS:
            return None
        integers, scales = map(torch.from_numpy, unpack(kind, np.array(self.header.data(theirs))))
        if not scales.isfinite().all():
            raise UserError(f"{self.header.file}: {theirs} has scales that are no numbers: it is damaged")
        integers, scales = halved(integers, self.heads(name)), _shared(halved(scales, self.heads(name)))
        bits = WIDTH[kind]
        shape = (integers.shape[0], integers.shape[1])
        if bits == 1:
            doubled = 2 * scales
            if doubled.max() > torch.finfo(torch.float16).max:
                return None
            return Codes((integers > 0).to(torch.uint8), 1, {"scales": doubled, "zero": torch.tensor([0.5])}, shape)
        zero = 1 if bits == 2 else 2 ** (bits - 1)
        tensors = {"scales": scales} | ({"zero": torch.ones(1)} if bits == 2 else {})
        return Codes((integers.int() + zero).to(torch.uint8), bits, tensors, shape)


def _shared(scales: Tensor) -> Tensor:
    """Scales [rows, groups] with as few groups as hold the same values: neighbours in a row that are equal are one."""
    groups = scales.shape[1]
    for number in range(1, groups):
        if groups % number == 0:
            parts = scales.unflatten(1, (number, -1))
            if torch.equal(parts, parts[..., :1].expand_as(parts)):
                return parts[..., 0].contiguous()
    return scales


def _ends(header: Header) -> dict[str, Any]:
    stops = stop_ids(header) if has_tokenizer(header) else []
    begin = header.metadata.get("tokenizer.ggml.bos_token_id")
    return {"bos_token_id": begin, "eos_token_id": stops[0] if stops else None}


def _write(contents: _Contents, folder: Path, use: Use) -> None:
    tokenizer = tokenizer_of(contents.header) if has_tokenizer(contents.header) else None
    config = dict(contents.config)
    layers: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    if use == "packed":
        state = _packed_state(contents, layers, tied)
        config["dtype"] = "bfloat16"
        if tied:
            config["tie_word_embeddings"] = False
        if layers:
            method = {"name": "uniform", "bits": 4, "granularity": "group"}
            section = {"quant_method": QUANT_METHOD, "format": WITH_HEAD, "method": method, "layers": layers}
            config["quantization_config"] = section | {"tied": tied}
    else:
        dtype = _dtype(contents)
        state = {name: contents.values(name, dtype) for name, _ in contents.skeleton.named_parameters()}
        config["dtype"] = str(dtype).removeprefix("torch.")
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    ends = _ends(contents.header)
    if has_tokenizer(contents.header):
        ends["eos_token_id"] = stop_ids(contents.header) or None
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _packed_state(contents: _Contents, layers: dict[str, dict[str, Any]], tied: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors of a packed folder, and fill in the specs of its packed `layers` and what is `tied`."""
    state: dict[str, Tensor] = {}
    shared = contents.config["tie_word_embeddings"]
    for name, parameter in contents.skeleton.named_parameters():
        fqn, _, part = name.rpartition(".")
        module = contents.skeleton.get_submodule(fqn)
        table = isinstance(module, nn.Embedding)
        stays = isinstance(module, nn.Linear) or (table and contents.kind(name) in TABLES)
        codes = contents.codes(name) if part == "weight" and stays else None
        if codes is None:
            state[name] = contents.values(name, torch.bfloat16 if parameter.ndim > 1 else torch.float32)
            continue
        if table and shared:  # the head owns the tensors of both
            tied[fqn], fqn = "lm_head", "lm_head"
        has_bias = isinstance(module, nn.Linear) and module.bias is not None
        tensors = {key: list(value.shape) for key, value in codes.tensors.items()}
        spec = LayerSpec(list(codes.shape), codes.bits, list(codes.index.shape), tensors, has_bias)
        layers[fqn] = {key: value for key, value in vars(spec).items() if value is not None}
        state[f"{fqn}.weight"] = pack(codes.index, codes.bits)
        state |= {f"{fqn}.{key}": value.half() for key, value in codes.tensors.items()}
    return state


def _dtype(contents: _Contents) -> torch.dtype:
    """The smallest dtype for all matrices: fp16, whose digits hold every scale, unless the file has a wider one."""
    kinds = {contents.kind(name) for name, p in contents.skeleton.named_parameters() if p.ndim > 1}
    return torch.float32 if "F32" in kinds else torch.bfloat16 if "BF16" in kinds else torch.float16
