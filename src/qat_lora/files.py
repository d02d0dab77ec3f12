"""Checkpoints of the ANEMLL guide: ours, and the `.pt` state dicts that others trained.

Of a quantized layer such a file holds `scale_A` [out, r], `scale_B` [r, in], `lut` [2**bits], and frozen codes
(`_indices`, `_Q`, or table entries for a `weight`) with magnitudes (`rank_magnitude`), or a latent `weight`. Bits and
ranks follow from the shapes. It is unpickled with `weights_only`: it cannot run code.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree import checkpoint, load
from wrinklefree import config as configs
from wrinklefree.core import surgery
from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.lowrank import Factors, nearest
from wrinklefree.core.method import quant_layers
from wrinklefree.export.anemll import write_state
from wrinklefree.methods.anemll import Config, LutLinear

State = dict[str, Tensor]


class Opened(NamedTuple):
    """A trained model with the config that rebuilds it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: configs.Config


def open_checkpoint(path: Path, base: str) -> Opened:
    """A run or checkpoint folder of ours, or someone's `.pt` file, whose pretrained model is `base`.

    A `.pt` path that is no file stands for the run whose folder it is in: `RUN/best_state_dict.pt` for `RUN/best/`.
    Raises UserError where there is neither, or the model has no lookup tables.
    """
    if path.is_file():
        return open_state(path, base)
    folder = load.model_folder(standing_for(path))
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{path}: no such file, and no checkpoint of `wf anemll` or `wf train` in its place")
    opened = Opened(*load.load(folder), configs.from_yaml(file))
    if not isinstance(opened.config.method, Config):
        raise UserError(f"{path}: not trained with lookup tables; see `wf anemll`")
    return opened


def standing_for(path: Path) -> Path:
    """The folder that a path to a `.pt` file means: `best/` beside it by its name, a step's, or the run."""
    if path.suffix != ".pt" or path.exists():
        return path
    run, step = path.parent, re.search(r"step_?(\d+)", path.stem)
    if path.stem.startswith("best") and (run / "best").is_dir():
        return run / "best"
    return run / "checkpoints" / f"step_{step[1]}" if step else run


def save(opened: Opened, target: Path, force: bool = False) -> None:
    """A `.pt` file for ANEMLL's converters, or a checkpoint folder. Raises UserError for one that is there already."""
    if target.exists() and not force:
        raise UserError(f"{target}: exists already; choose another, or give --force to replace it")
    if target.suffix == ".pt":
        write_state(opened.model, target)
        opened.tokenizer.save_pretrained(target.parent)
    else:
        checkpoint.save(target, opened.model, opened.tokenizer, opened.config, None)


@torch.no_grad()
def open_state(file: Path, base: str) -> Opened:
    """The model `base` with the quantized layers of someone's `.pt` file.

    Raises UserError where the file and the model do not fit one another.
    """
    state = read_state(file)
    found = layers_in(state, file)
    method = detect(found, file)
    names = [f"method.{key}={value}" for key, value in method.items()]
    config = configs.load([f"model={base}", f"training=anemll_{'v2' if method['view'] == 'v2' else 'q2a4'}", *names])
    model, tokenizer = load.load_pretrained(config.model)
    assert config.method is not None
    model = cast(PreTrainedModel, config.method.prepare(model, initialize=False))
    put(model, state, found, file)
    return Opened(model.eval(), tokenizer, config)


def read_state(file: Path) -> State:
    """The tensors in a `.pt` file, also where they lie under `model_state_dict`. Raises UserError for anything else."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file}: not a state dict that can be read safely: {str(error).splitlines()[0]}") from error
    if isinstance(found, dict) and "model_state_dict" in found:
        found = found["model_state_dict"]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values() if t is not None):
        raise UserError(f"{file}: holds no tensors by name, so not a model's state dict")
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@dataclass(frozen=True)
class Layer:
    """What a file holds of one layer: table, factors with magnitudes, and codes or a latent weight."""

    factors: Factors
    codes: Tensor | None  # uint8 [out, in]; None where they follow from the latent weight
    weight: Tensor | None


def layers_in(state: State, file: Path) -> dict[str, Layer]:
    """The quantized layers of a state dict. Raises UserError where there are none, or their shapes do not fit."""
    names = sorted(name.removesuffix(".scale_A") for name in state if name.endswith(".scale_A"))
    if not names:
        raise UserError(f"{file}: no tensor named *.scale_A, so not a checkpoint with tables and low-rank scales")
    return {name: _layer(state, name, file) for name in names}


def _layer(state: State, fqn: str, file: Path) -> Layer:
    part = {n.rpartition(".")[2]: t for n, t in state.items() if n.rpartition(".")[0] == fqn}
    missing = {"lut", "scale_A", "scale_B"} - part.keys()
    if missing or not part.keys() & {"weight", "_Q", "_indices"}:
        raise UserError(f"{file}: {fqn} lacks {', '.join(sorted(missing)) or 'weights and codes'}")
    a, b = part["scale_A"].float(), part["scale_B"].float()
    table, order = part["lut"].float().sort()
    known = next(part[name] for name in ("_indices", "_Q", "weight") if name in part)
    b = b[:, : known.shape[1]]  # v1 pads to whole groups
    if a.shape != (known.shape[0], len(b)) or len(table) not in (4, 8, 16):
        raise UserError(f"{file}: {fqn}: shapes of scale_A, scale_B, lut and weight do not fit one another")
    if "rank_magnitude" in part:
        baked = bool(part.get("_scales_baked_flag", torch.zeros(())).any())
        if not baked:
            a, b = a / a.norm(dim=0).clamp_min(1e-6), b / b.norm(dim=1, keepdim=True).clamp_min(1e-6)
        a = a * part["rank_magnitude"].float()
    factors = Factors(table, a, b)
    if "_indices" in part:
        return Layer(factors, order.argsort()[part["_indices"].long()].to(torch.uint8), None)
    entries = part.get("_Q", part.get("weight"))
    assert entries is not None
    if "_Q" in part or torch.isin(entries.float(), table).all():  # what this module writes has entries for weights
        return Layer(factors, nearest(entries.float(), table), None)
    return Layer(factors, None, entries.float())


def detect(found: Mapping[str, Layer], file: Path) -> dict[str, Any]:
    """`view`, bits and ranks as settings of the method. Raises UserError where layers of one kind differ."""
    config = Config()
    sizes: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for fqn, layer in found.items():
        shape = (len(layer.factors.table).bit_length() - 1, len(layer.factors.b))
        sizes[surgery.matches(fqn, config.attn_names)].add(shape)
    settings: dict[str, Any] = {"view": "v2" if all(la.codes is not None for la in found.values()) else "v1"}
    for attention, prefix in ((False, ""), (True, "attn_")):
        if len(sizes[attention]) > 1:
            raise UserError(f"{file}: layers of one kind have different bits or ranks: {sorted(sizes[attention])}")
        for bits, rank in sizes[attention]:
            settings |= {f"{prefix}bits": bits, f"{prefix}rank": rank}
    return settings


@torch.no_grad()
def put(model: nn.Module, state: State, found: Mapping[str, Layer], file: Path) -> int:
    """Put a file's tensors into a prepared model, whose own stay where the file has none; the number of layers.

    Raises UserError where layers or shapes are not those of the model.
    """
    layers = quant_layers(model)
    if layers.keys() != found.keys():
        odd = sorted(layers.keys() ^ found.keys())
        raise UserError(f"{file}: does not fit: {odd[0]} is quantized in one of them alone ({len(odd)} in all)")
    for fqn, layer in layers.items():
        assert isinstance(layer, LutLinear)
        source = found[fqn]
        codes = source.codes
        if (layer.out_features, layer.in_features) != (len(source.factors.a), source.factors.b.shape[1]):
            raise UserError(f"{file}: {fqn} has another shape than in the model")
        if source.weight is not None:
            layer.weight.copy_(source.weight)
        elif codes is not None:
            layer.weight.copy_(layer.decode(_codes(source.factors, codes, layer)))
        layer.adopt(source.factors, torch.zeros_like(layer.weight, dtype=torch.uint8) if codes is None else codes)
    own = model.state_dict()
    plain = {name: t for name, t in state.items() if name in own and name.rpartition(".")[0] not in found}
    for name, tensor in plain.items():
        if own[name].shape != tensor.shape:
            raise UserError(f"{file}: {name} is {list(tensor.shape)}, the model's is {list(own[name].shape)}")
        own[name].copy_(tensor)
    return len(layers)


def _codes(factors: Factors, index: Tensor, layer: LutLinear) -> Codes:
    tensors = {"lut": factors.table, "a": factors.a, "b": factors.b}
    return Codes(index, layer.config.bits, tensors, (layer.out_features, layer.in_features))
