"""Makes a model folder of a GGUF file, once, in the cache: packed to run, or in floating point to train from.

| type in the file | in a packed folder |
|---|---|
| Q1_0, TQ1_0, TQ2_0, Q2_0, Q4_0 | the same integers and scales, for the native kernels |
| Q8_0 | the same integers and scales; the native kernels round them to one scale per row |
| F32, F16, BF16 and every other type | decoded, in bf16; vectors and routers of experts in fp32 |

Experts, which are one tensor in the file and in transformers, are one packed layer each.

Scales that are equal along a row are stored once. `transformers` reads the same folders.
"""

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
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
from wrinklefree.gguf.names import IN_FULL, gguf_names, halved, heads_of, stored_shape
from wrinklefree.gguf.settings import Settings
from wrinklefree.gguf.tokens import has_tokenizer, stop_ids, tokenizer_of
from wrinklefree.gguf.values import read_weight
from wrinklefree.packed.layer import LayerSpec
from wrinklefree.packed.quantizer import QUANT_METHOD, WITH_STACKS
from wrinklefree.training.storage import cache_folder

log = logging.getLogger("wrinklefree")

Use = Literal["packed", "dense"]

VERSION = 2  # of the folders; a new one makes them anew
TABLES = ("Q4_0", "Q8_0")  # types of embeddings that stay integers: their code for 0 is in the middle
PARTS_OF_A_LAYER = 6  # tensors that each layer has at least
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
    tensors = (tensor for name, tensor in header.tensors.items() if "ffn_gate_inp" not in name)  # stay in fp32
    kinds = Counter(tensor.kind for tensor in tensors if len(tensor.shape) > 1)
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
        wanted: dict[str, tuple[int, ...]] = {}
        for name, parameter in self.skeleton.named_parameters():
            places = gguf_names(name, self.arch)
            wanted |= {place: stored_shape(place, tuple(parameter.shape), len(places)) for place in places}
        for theirs, tensor in self.header.tensors.items():
            if theirs not in IGNORED and theirs not in wanted:
                raise UserError(f"{self.header.file}: {theirs}: a {self.config['model_type']} has no such tensor")
            if theirs in wanted and tensor.shape != wanted[theirs]:
                raise UserError(f"{self.header.file}: {theirs} is {tensor.shape}, its settings say {wanted[theirs]}")
        missing = [name for name in wanted if name not in self.header.tensors]
        if missing:
            raise UserError(f"{self.header.file}: {missing[0]} is missing ({len(missing)} such tensors)")

    def heads(self, name: str) -> int | None:
        return heads_of(name, self.arch, self.config["num_attention_heads"], self.config["num_key_value_heads"])

    def kinds(self, name: str) -> set[str]:
        """The types of the tensors that make a parameter."""
        return {self.header.tensors[place].kind for place in gguf_names(name, self.arch)}

    def values(self, name: str, dtype: torch.dtype) -> Tensor:
        values = read_weight(self.header, name, self.heads(name))
        if not values.isfinite().all():
            raise self._damaged(name, "values")
        return values.to(dtype).reshape(self.skeleton.get_parameter(name).shape)

    def codes(self, name: str) -> list[Codes]:
        """The integers and scales of a matrix as codes of `methods/uniform`, those of a tensor of experts one by one.

        Empty for types without integers and scales.
        """
        kind, *others = self.kinds(name)
        if others or kind not in INTEGERS:
            return []
        shape = self.skeleton.get_parameter(name).shape
        parts = [self._unpacked(place, kind, shape[:-2]) for place in gguf_names(name, self.arch)]
        if not all(scales.isfinite().all() for _, scales in parts):
            raise self._damaged(name, "scales")
        integers, scales = (torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True))
        if len(shape) == 2:
            integers, scales = halved(integers, self.heads(name)), halved(scales, self.heads(name))
            integers, scales = integers[None], scales[None]
        found = [_codes(kind, *expert) for expert in zip(integers, scales, strict=True)]
        return [codes for codes in found if codes is not None] if None not in found else []

    def _unpacked(self, place: str, kind: str, experts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Integers and scales [.., out, in] of one tensor."""
        integers, scales = map(torch.from_numpy, unpack(kind, np.array(self.header.data(place))))
        return integers.reshape(*experts, -1, integers.shape[-1]), scales.reshape(*experts, -1, scales.shape[-1])

    def _damaged(self, name: str, what: str) -> UserError:
        place = gguf_names(name, self.arch)[0]
        return UserError(f"{self.header.file}: {place} holds {what} that are no numbers: it is damaged")


def _codes(kind: str, integers: Tensor, scales: Tensor) -> Codes | None:
    """One matrix [out, in]. None if fp16 does not hold what a scale becomes."""
    bits, scales, shape = WIDTH[kind], _shared(scales), (integers.shape[0], integers.shape[1])
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
    # Without padding: some classes have an id of their own for it, which need not be one of these tokens.
    return {"bos_token_id": begin, "eos_token_id": stops[0] if stops else None, "pad_token_id": None}


def _write(contents: _Contents, folder: Path, use: Use) -> None:
    tokenizer = tokenizer_of(contents.header) if has_tokenizer(contents.header) else None
    config = dict(contents.config)
    if use == "packed":
        packed = _Packed.of(contents)
        state = packed.state
        config |= {"dtype": "bfloat16"} | packed.settings()
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


@dataclass
class _Packed:
    """Contents of a packed folder."""

    state: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  # specs of packed layers
    tied: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, int] = field(default_factory=dict)  # of experts: how many there are

    @classmethod
    def of(cls, contents: _Contents) -> "_Packed":
        packed = cls()
        for name, parameter in contents.skeleton.named_parameters():
            if not packed._take(name, parameter.ndim == 3, contents):
                plain = parameter.ndim > 1 and not name.endswith(IN_FULL)
                packed.state[name] = contents.values(name, torch.bfloat16 if plain else torch.float32)
        return packed

    def _take(self, name: str, experts: bool, contents: _Contents) -> bool:
        """Add a matrix, or a tensor of experts, as codes, if its type is one that stays."""
        fqn, _, part = name.rpartition(".")
        module = contents.skeleton.get_submodule(fqn)
        table, linear = isinstance(module, nn.Embedding), isinstance(module, nn.Linear) and part == "weight"
        stays = linear or experts or (table and contents.kinds(name) <= set(TABLES))
        codes = contents.codes(name) if stays else []
        if codes and experts:
            self.stacks[name] = len(codes)
            for number, each in enumerate(codes):
                self._add(f"{name}.{number}", each, has_bias=False)
        elif codes and table and contents.config["tie_word_embeddings"]:
            self.tied[fqn] = "lm_head"  # the head owns the tensors of both
            self._add("lm_head", codes[0], has_bias=False)
        elif codes:
            self._add(fqn, codes[0], isinstance(module, nn.Linear) and module.bias is not None)
        return bool(codes)

    def _add(self, fqn: str, codes: Codes, has_bias: bool) -> None:
        tensors = {key: list(value.shape) for key, value in codes.tensors.items()}
        spec = LayerSpec(list(codes.shape), codes.bits, list(codes.index.shape), tensors, has_bias)
        self.layers[fqn] = {key: value for key, value in vars(spec).items() if value is not None}
        self.state[f"{fqn}.weight"] = pack(codes.index, codes.bits)
        self.state |= {f"{fqn}.{key}": value.half() for key, value in codes.tensors.items()}

    def settings(self) -> dict[str, Any]:
        """What config.json says of it."""
        if not self.layers:
            return {}
        method = {"name": "uniform", "bits": 4, "granularity": "group"}
        section = {"quant_method": QUANT_METHOD, "format": WITH_STACKS, "method": method, "layers": self.layers}
        section |= {"tied": self.tied, "stacks": self.stacks}
        return {"quantization_config": section} | ({"tie_word_embeddings": False} if self.tied else {})


def _dtype(contents: _Contents) -> torch.dtype:
    """The smallest dtype for all matrices: fp16, whose digits hold every scale, unless the file has a wider one."""
    kinds: set[str] = set()
    for name, parameter in contents.skeleton.named_parameters():
        if parameter.ndim > 1 and not name.endswith(IN_FULL):
            kinds |= contents.kinds(name)
    return torch.float32 if "F32" in kinds else torch.bfloat16 if "BF16" in kinds else torch.float16
