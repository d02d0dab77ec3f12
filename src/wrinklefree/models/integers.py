"""Makes a packed folder of one with integers of other makes, once, in the cache: then the native kernels run it.

bitnet, packed      uint8 [out / 4, in]: four codes C in {-1, 0, 1} a byte, the first
                    quarter of the rows in its low bits. W = C / s (`bitlinear`) or C s (`autobitlinear`)
bitnet, online      the weight in floating point: W = C D, D = mean |weight|, C = clip(round(weight / D), -1, 1)
compressed-tensors  int32 words of b-bit codes q, the first column in the low bits: W = (q - 2^(b-1)) s

s is one scale, one per row or one per row and group of columns. Scales become fp16. All else is copied as it is.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from wrinklefree.core.codes import Codes, pack
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, written_aside
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.export.formats import bitnet
from wrinklefree.models.check import LARGEST_CONFIG, Contents, check_folder
from wrinklefree.models.headers import Header, weight_files
from wrinklefree.models.load import checkpoint_config, meta_model
from wrinklefree.packed.layer import LayerSpec
from wrinklefree.packed.quantizer import PLAIN, QUANT_METHOD, WITH_NORMS
from wrinklefree.training.storage import cache_folder

log = logging.getLogger("wrinklefree")

VERSION = 1  # of the folders; a new one makes them anew
WIDTHS = (2, 4, 8)  # bits of a code that are read
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
CODE_PARTS = ("weight", "weight_scale", "weight_packed", "weight_shape")

Read = Callable[[str], Tensor]


def integers_folder(folder: Path) -> Path | None:
    """Return a packed copy of a bitnet or compressed-tensors folder. The first call writes it.

    None for every other folder, and for those whose integers are of a kind that is not read here; then a line says so.
    Raises UserError if the folder is damaged.
    """
    section = _section(folder)
    if section is None or checkpoint_config(folder) is not None:
        return None
    kind = section["quant_method"]
    reason = {"bitnet": _not_bitnet, "compressed-tensors": _not_plain_integers}[kind](section)
    if reason is not None:
        log.info("%s: %s: transformers reads it", folder, reason)
        return None
    contents = check_folder(folder)
    state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(folder)]
    key = fingerprint([VERSION, str(folder.resolve()), state, section])
    target = cache_folder() / "integers" / f"{folder.resolve().name}-{key}"
    if not target.is_dir():
        with written_aside(target) as aside:
            _Folder.of(contents, section).write(aside)
    log.info("%s: %s integers, run by the native kernels; folder %s", folder, kind, target)
    return target


def _section(folder: Path) -> dict[str, Any] | None:
    file = folder / "config.json"
    config = read_json(file, LARGEST_CONFIG) if file.is_file() else None
    values = config.get("quantization_config") if isinstance(config, dict) else None
    known = isinstance(values, dict) and values.get("quant_method") in ("bitnet", "compressed-tensors")
    return values if known else None


def _not_bitnet(section: dict[str, Any]) -> str | None:
    known = section.get("linear_class", "bitlinear") in ("bitlinear", "autobitlinear")
    return None if known else f"linear_class={section['linear_class']!r}"


def _not_plain_integers(section: dict[str, Any]) -> str | None:
    """Why a section of compressed-tensors is not read here, or None."""
    groups = section.get("config_groups")
    if section.get("format") != "pack-quantized" or not isinstance(groups, dict) or len(groups) != 1:
        return f"format {section.get('format')!r} with {len(groups or ())} groups of layers"
    group = next(iter(groups.values()))
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    if weights.get("type") != "int" or not weights.get("symmetric") or weights.get("num_bits") not in WIDTHS:
        return f"weights of {weights.get('num_bits')} bits, type {weights.get('type')}"
    if weights.get("actorder") not in (None, "weight", "static"):
        return f"actorder={weights['actorder']!r}"
    if inputs is not None and (inputs.get("num_bits"), inputs.get("dynamic")) != (8, True):
        return "inputs that are rounded in another way than to int8 per token"
    return None


@dataclass(frozen=True)
class _Folder:
    """A folder whose headers fit the model that its config describes."""

    path: Path
    section: dict[str, Any]
    config: dict[str, Any]
    header: Header
    linear: dict[str, nn.Linear]  # on the meta device

    @classmethod
    def of(cls, contents: Contents, section: dict[str, Any]) -> "_Folder":
        modules = meta_model(str(contents.folder), False).named_modules()
        linear = {fqn: module for fqn, module in modules if isinstance(module, nn.Linear)}
        return cls(contents.folder, section, contents.config, contents.header, linear)

    @property
    def is_bitnet(self) -> bool:
        return bool(self.section["quant_method"] == "bitnet")

    def write(self, folder: Path) -> None:
        """Write the packed folder. Raises UserError for a layer whose tensors do not fit."""
        state: dict[str, Tensor] = {}
        layers: dict[str, dict[str, Any]] = {}
        with _reading(self.path) as read:
            for fqn in self.linear:
                codes = self._codes(fqn, read)
                if codes is not None:
                    layers[fqn] = self._spec(fqn, codes)
                    state[f"{fqn}.weight"] = pack(codes.index, codes.bits)
                    state |= {f"{fqn}.{name}": tensor.half() for name, tensor in codes.tensors.items()}
            if not layers:
                raise UserError(f"{self.path}: none of its layers is stored as {self.section['quant_method']} integers")
            parts = {f"{fqn}.{part}" for fqn in layers for part in CODE_PARTS}
            state |= {name: read(name) for name in self.header if name not in parts}
        for file in (file for pattern in COPIED for file in self.path.glob(pattern)):
            if file.is_file() and not file.name.endswith(".safetensors.index.json"):
                shutil.copy(file, folder)
        save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors", {"format": "pt"})
        config = self.config | {"quantization_config": self._packed_section(layers)}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    def _packed_section(self, layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
        rounded = self.is_bitnet or next(iter(self.section["config_groups"].values())).get("input_activations")
        method = {"name": "uniform", "granularity": "group", "activation_bits": 8 if rounded else None}
        format = WITH_NORMS if any("norm_eps" in spec for spec in layers.values()) else PLAIN
        return {"quant_method": QUANT_METHOD, "format": format, "method": method, "layers": layers}

    def _spec(self, fqn: str, codes: Codes) -> dict[str, Any]:
        tensors = {name: list(tensor.shape) for name, tensor in codes.tensors.items()}
        normed = f"{fqn}.rms_norm.weight" in self.header
        eps = float(self.section.get("rms_norm_eps", 1e-6)) if normed else None
        has_bias = self.linear[fqn].bias is not None
        spec = LayerSpec(list(codes.shape), codes.bits, list(codes.index.shape), tensors, has_bias, eps)
        return {name: value for name, value in vars(spec).items() if value is not None}

    def _codes(self, fqn: str, read: Read) -> Codes | None:
        """The codes of a layer, or None if it is stored in floating point."""
        found = self._of_bitnet(fqn, read) if self.is_bitnet else self._of_words(fqn, read)
        if found is None:
            return None
        integers, scales, bits = found
        wanted = (self.linear[fqn].out_features, self.linear[fqn].in_features)
        if tuple(integers.shape) != wanted or wanted[1] % scales.shape[1] or scales.shape[0] not in (1, wanted[0]):
            raise UserError(
                f"{self.path}: {fqn} holds {list(integers.shape)} integers and {list(scales.shape)} scales, "
                f"config.json says {list(wanted)}"
            )
        scales = scales.float().half().float().expand(wanted[0], -1)
        if not scales.isfinite().all():
            raise UserError(f"{self.path}: {fqn} has scales that are no fp16 numbers: it is damaged")
        if bits == 2 and int(integers.min()) >= -1:  # the order of codes that ternary kernels know
            return Codes((integers + 1).to(torch.uint8), 2, {"scales": scales, "zero": torch.ones(1)}, wanted)
        return Codes((integers.int() + 2 ** (bits - 1)).to(torch.uint8), bits, {"scales": scales}, wanted)

    def _of_bitnet(self, fqn: str, read: Read) -> tuple[Tensor, Tensor, int] | None:
        """Integers int8 [out, in] and the scale [1, 1]; both are 2-bit."""
        stored = self.header.get(f"{fqn}.weight")
        if stored is not None and stored.dtype == "U8":
            if f"{fqn}.weight_scale" not in self.header:
                raise UserError(f"{self.path}: {fqn}.weight_scale is missing")
            scale = read(f"{fqn}.weight_scale").float().reshape(1, 1)
            divides = self.section.get("linear_class", "bitlinear") == "bitlinear"
            return bitnet.unpack(read(f"{fqn}.weight")), 1 / scale if divides else scale, 2
        spared = self.section.get("modules_to_not_convert") or ["lm_head"]
        online = self.section.get("quantization_mode") == "online" and fqn not in spared
        if stored is None or not online:
            return None
        weight = read(f"{fqn}.weight").float()
        scale = weight.abs().mean().clamp_min(1e-5)
        return (weight * (1 / scale)).round().clamp(-1, 1).to(torch.int8), scale.reshape(1, 1), 2

    def _of_words(self, fqn: str, read: Read) -> tuple[Tensor, Tensor, int] | None:
        """Integers [out, in], scales [1 or out, groups], and the bits of a code."""
        stored = self.header.get(f"{fqn}.weight_packed")
        if stored is None:
            return None
        if stored.dtype != "I32" or len(stored.shape) != 2 or f"{fqn}.weight_scale" not in self.header:
            raise UserError(f"{self.path}: {fqn}.weight_packed is not int32 words with a weight_scale")
        bits = int(next(iter(self.section["config_groups"].values()))["weights"]["num_bits"])
        scales = read(f"{fqn}.weight_scale")
        scales = scales.unsqueeze(-1) if scales.ndim == 1 else scales
        return in_words(read(f"{fqn}.weight_packed"), bits, self.linear[fqn].in_features), scales, bits


def in_words(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack int32 [out, words] into integers int16 [out, columns] in [-2^(bits-1), 2^(bits-1))."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    found = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return found.flatten(1)[:, :columns].to(torch.int16) - 2 ** (bits - 1)


@contextmanager
def _reading(folder: Path) -> Iterator[Read]:
    """A function that reads a tensor by its name, from whichever file of the folder has it."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(folder)]
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # a file is no dictionary
        yield lambda name: where[name].get_tensor(name)
