"""Read and write checkpoints of the ANEMLL guide: our folders, and `.pt` state dicts of the original tools.

A state dict holds these tensors for each quantized layer:

| name | shape | |
|---|---|---|
| `scale_A`, `scale_B` | [out, r], [r, in] | the factors of the scales |
| `lut` | [2**bits] | the table |
| `rank_magnitude` | [r] | magnitudes; V2 only |
| `_indices` or `_Q` | [out, in] | frozen codes, as indices or as table entries |
| `weight` | [out, in] | table entries of frozen codes, or a latent weight |

Bits, ranks, and which layers are not quantized follow from the shapes and names.

The original V1 computes with max(A B, 1e-8), so a weight with a negative scale is zero there. Here it is what W / S
gives, as in the original conversion to V2.
"""

import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import config_yaml, load_config, read_config
from wrinklefree.config.schema import Config as RunConfig
from wrinklefree.config.values import setting
from wrinklefree.core import surgery
from wrinklefree.core.codes import Codes
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json
from wrinklefree.core.method import quant_layers
from wrinklefree.export.formats.anemll import write_state
from wrinklefree.methods.anemll import Config, LutLinear
from wrinklefree.methods.anemll.lowrank import Factors, guarded, nearest
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model, load_pretrained
from wrinklefree.training import checkpoint

State = dict[str, Tensor]

BEST_FILE = "best_state_dict.pt"  # in a run's folder, where the guide's next lines expect it

SOURCES = ("_indices", "_Q", "weight")  # tensors with a layer's codes; the first one that exists is used

# All tensors that a layer may have.
KNOWN = {
    *("weight", "bias", "lut", "scale_A", "scale_B", "rank_magnitude", "_indices", "_Q", "_scales_baked_flag"),
    "_cached_weight_q",  # not read: the others give it
    *("codes", "share"),  # of our own V2 layers; not read: `weight` and the scales in the file are made from them
}

# Tensors, these and others of the original layers, that no unquantized layer has.
OWN = KNOWN - {"weight", "bias"} | {"full_scales", "lora_A", "lora_B", "_lut_raw_deltas", "A_lut", "B_lut"}

# Settings of the original tools that change what the tensors mean, and the values that they are read with.
SETTINGS: dict[str, Any] = {"force_positive_scales": False, "magnitude_activation": "identity"}

TABLES = ".rotary_emb.inv_freq"  # older files have it; the model computes it from its config


class Opened(NamedTuple):
    """A trained model, its tokenizer, and the config from which it can be rebuilt."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: RunConfig


def open_checkpoint(path: Path, base: str) -> Opened:
    """Open a run or checkpoint folder, or a `.pt` file that was trained from the pretrained model `base`.

    If a `.pt` path does not exist, the checkpoint in its folder is opened: `RUN/best/` for `RUN/best_state_dict.pt`.
    Raises UserError if there is no checkpoint, or its model has no lookup tables.
    """
    standing = standing_for(path)
    if standing.is_file():
        return open_state(path, base)
    folder = model_folder(standing)
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{path}: no such file, and no checkpoint of `wf anemll` or `wf train` there")
    opened = Opened(*load_model(folder), read_config(file))
    if not isinstance(opened.config.method, Config):
        raise UserError(f"{path}: not trained with lookup tables; see `wf anemll`")
    return opened


def standing_for(path: Path) -> Path:
    """The checkpoint folder that stands for the path of a `.pt` file; any other path as it is.

    | file | folder |
    |---|---|
    | `RUN/best_state_dict.pt`, written from `RUN/best` | `RUN/best`, which holds the same and more |
    | one that does not exist: `RUN/best*.pt` | `RUN/best`, if it exists |
    | `RUN/*step_100*.pt` | `RUN/checkpoints/step_100` |
    | another | `RUN` |
    """
    ours = path.name == BEST_FILE and (path.parent / "best").is_dir()
    if path.suffix != ".pt" or (path.exists() and not ours):
        return path
    run, step = path.parent, re.search(r"step_?(\d+)", path.stem)
    if path.stem.startswith("best") and (run / "best").is_dir():
        return run / "best"
    return run / "checkpoints" / f"step_{step[1]}" if step else run


def check_free(target: Path, force: bool) -> None:
    """Raise UserError if `target` exists (unless `force`), or its folder is not writable."""
    if target.exists() and not force:
        raise UserError(f"{target}: exists already; choose another, or give --force to replace it")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise UserError(f"{target}: {parent} is no folder to write to; choose another")


def save(opened: Opened, target: Path, force: bool = False) -> None:
    """Write a `.pt` file for ANEMLL's converters, or a checkpoint folder if `target` has no such suffix.

    Raises UserError if `target` exists (unless `force`), or its folder is not writable.
    """
    check_free(target, force)
    if target.suffix == ".pt":
        write_state(opened.model, target)
        opened.tokenizer.save_pretrained(target.parent)
    else:
        checkpoint.save(target, opened.model, opened.tokenizer, config_yaml(opened.config), None)


@torch.no_grad()
def open_state(file: Path, base: str) -> Opened:
    """Load the pretrained model `base` and put the quantized layers of a `.pt` file into it.

    Raises UserError if the file does not fit the model.
    """
    state = read_state(file)
    quantized = layers_in(state, file)
    said(quantized)
    method = detect(quantized, file)
    names = [setting(f"method.{key}", value) for key, value in method.items()]
    config = load_config([f"model={base}", f"training=anemll_{'v2' if method['view'] == 'v2' else 'q2a4'}", *names])
    model, tokenizer = load_pretrained(config.model)
    assert config.method is not None
    plain = surgery.linears(model, config.method.exclude_names)
    config.method.exclude_names += [fqn for fqn, _ in plain if fqn not in quantized and f"{fqn}.weight" in state]
    model = cast(PreTrainedModel, config.method.prepare(model, initialize=False))
    put(model, state, quantized, file)
    return Opened(model.eval(), tokenizer, config)


def read_state(file: Path) -> State:
    """The tensors in a `.pt` file, which may lie under the key `model_state_dict`. Raises UserError for other files."""
    try:  # `weights_only`, so that a file cannot run code
        found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError) as error:
        # torch's own message advises to load the file without `weights_only`, which would run its code.
        raise UserError(
            f"{file}: not a state dict that can be read safely: it is damaged, or holds more than tensors by name; "
            f"save it anew with torch.save(model.state_dict(), FILE)"
        ) from error
    if isinstance(found, dict) and "model_state_dict" in found:
        _refuse_settings(file, found.get("config"))
        found = found["model_state_dict"]
    for beside in ("config.json", "v2_config.json"):
        if (file.parent / beside).is_file():
            _refuse_settings(file.parent / beside, read_json(file.parent / beside))
    if not isinstance(found, dict) or not all(isinstance(t, (Tensor, type(None))) for t in found.values()):
        raise UserError(f"{file}: holds no tensors by name, so not a model's state dict")
    return {str(name): tensor for name, tensor in found.items() if tensor is not None}


def _refuse_settings(file: Path, settings: Any) -> None:
    """Raise UserError if the original tools wrote a setting with which the tensors mean something else."""
    for name, value in SETTINGS.items():
        if isinstance(settings, dict) and settings.get(name, value) != value:
            raise UserError(f"{file}: {name}={settings[name]} is not read, only {name}={value}")


@dataclass(frozen=True)
class Layer:
    """One quantized layer of a file. The magnitudes are part of the factors."""

    factors: Factors
    codes: Tensor  # uint8 [out, in]
    weight: Tensor | None  # the latent weight; None if the codes are frozen


def layers_in(state: State, file: Path) -> dict[str, Layer]:
    """The quantized layers of a state dict, by name. Raises UserError if there are none, or one has wrong shapes."""
    names = sorted(name.removesuffix(".scale_A") for name in state if name.endswith(".scale_A"))
    if not names:
        raise UserError(f"{file}: no tensor named *.scale_A, so not a checkpoint with tables and low-rank scales")
    # A layer whose scales have full rank has no scale_A. Without this it would be taken for an unquantized one.
    for name in sorted(state):
        fqn, _, kind = name.rpartition(".")
        if fqn not in names and kind in OWN:
            raise UserError(f"{file}: {name}: a layer with this and without scale_A is not read")
    return {name: _layer(state, name, file) for name in names}


def _layer(state: State, fqn: str, file: Path) -> Layer:
    """Read one layer. Raises UserError if a tensor is missing or has a wrong shape."""
    part = {n.rpartition(".")[2]: t for n, t in state.items() if n.rpartition(".")[0] == fqn}
    wrong = _missing(part) or _misfit(part)
    if wrong:
        raise UserError(f"{file}: {fqn}{wrong}")
    table, order = part["lut"].float().sort()
    width = next(part[name] for name in SOURCES if name in part).shape[1]
    a, b = part["scale_A"].float(), part["scale_B"].float()[:, :width]  # V1 pads B to whole groups
    if "rank_magnitude" in part:
        a, b = _with_magnitudes(part, a, b)
    factors = Factors(table, a, b)
    if "_indices" in part:
        return Layer(factors, order.argsort()[part["_indices"].long()].to(torch.uint8), None)
    entries = part["_Q" if "_Q" in part else "weight"].float()
    if "_Q" in part or torch.isin(entries, table).all():  # files that we write have table entries as weights
        return Layer(factors, nearest(entries, table), None)
    if "rank_magnitude" in part:  # V2 before its codes were frozen
        return Layer(factors, nearest(entries / guarded(a @ b), table), None)
    return Layer(factors, _latent_codes(entries / guarded(a @ b), table), entries)


def _latent_codes(ratios: Tensor, table: Tensor) -> Tensor:
    """Codes of the nearest table entries."""
    # The original V1 compares with an evenly spaced table before it is rounded to fp16.
    even = torch.linspace(-1, 1, len(table))
    return nearest(ratios, even if torch.allclose(table, even, atol=1e-3) else table)


def _missing(part: State) -> str:
    """A message about tensors of a layer that are missing or unexpected; an empty text if there are none."""
    missing = {"lut", "scale_A", "scale_B"} - part.keys()
    if missing or not part.keys() & set(SOURCES):
        return f" lacks {', '.join(sorted(missing)) or 'weights and codes'}"
    unknown = sorted(part.keys() - KNOWN)
    if not unknown:
        return ""
    advice = "an adapter, which is not read: merge it into the weights first"
    return f".{unknown[0]}: {advice if unknown[0].startswith('lora_') else 'not known, and it may change the weights'}"


def _misfit(part: State) -> str:
    """A message about wrong shapes or values in a layer; an empty text if there are none."""
    a, b, rows = part["scale_A"], part["scale_B"], [part[name] for name in SOURCES if name in part]
    fits = all(t.ndim == 2 for t in (a, b, *rows)) and part["lut"].shape in ((4,), (8,), (16,))
    fits = fits and a.shape == (len(a), len(b)) and all(t.shape == (len(a), rows[0].shape[1]) for t in rows)
    fits = fits and b.shape[1] >= rows[0].shape[1] and part.get("rank_magnitude", b[:, 0]).shape == (len(b),)
    if not fits:
        return ": shapes of scale_A, scale_B, lut and weight do not fit one another"
    if not all(t.isfinite().all() for t in part.values()):
        return ": holds infinite numbers, or none"
    codes = part.get("_indices", torch.zeros(1))
    return "" if codes.min() >= 0 and codes.max() < len(part["lut"]) else ": _indices point out of the table"


def _with_magnitudes(part: State, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors A [out, r] and B [r, in] with the magnitudes multiplied into A."""
    g = part["rank_magnitude"].float()
    # Baked factors are used as they are. Otherwise they are directions, which have to be normalized first.
    if bool(part.get("_scales_baked_flag", torch.zeros(())).any()):
        return a * g, b
    return a / a.norm(dim=0).clamp_min(1e-6) * (g + 1e-6), b / b.norm(dim=1, keepdim=True).clamp_min(1e-6)


def detect(found: Mapping[str, Layer], file: Path) -> dict[str, Any]:
    """The method settings `view`, bits and ranks that fit a file's layers.

    Raises UserError if the MLP layers, or the attention layers, differ among themselves.
    """
    config = Config()
    sizes: dict[bool, set[tuple[int, int]]] = {True: set(), False: set()}
    for fqn, layer in found.items():
        shape = (len(layer.factors.table).bit_length() - 1, len(layer.factors.b))
        sizes[surgery.matches(fqn, config.attn_names)].add(shape)
    settings: dict[str, Any] = {"view": "v2" if all(la.weight is None for la in found.values()) else "v1"}
    for attention, prefix in ((False, ""), (True, "attn_")):
        if len(sizes[attention]) > 1:
            raise UserError(f"{file}: layers of one kind have different bits or ranks: {sorted(sizes[attention])}")
        for bits, rank in sizes[attention]:
            settings |= {f"{prefix}bits": bits, f"{prefix}rank": rank}
    return settings


@torch.no_grad()
def put(model: nn.Module, state: State, found: Mapping[str, Layer], file: Path) -> int:
    """Copy a file's tensors into a prepared model, and return how many layers are quantized.

    Tensors that the file lacks do not change. Raises UserError if layers or shapes differ.
    """
    layers = quant_layers(model)
    if layers.keys() != found.keys():
        odd = sorted(layers.keys() ^ found.keys())
        raise UserError(f"{file}: does not fit: {odd[0]} is quantized in only one of the two ({len(odd)} in all)")
    for fqn, layer in layers.items():
        assert isinstance(layer, LutLinear)
        source = found[fqn]
        if (layer.out_features, layer.in_features) != source.codes.shape:
            raise UserError(f"{file}: {fqn} has another shape than in the model")
        decoded = layer.decode(_codes(source, layer))
        layer.weight.copy_(decoded if source.weight is None else source.weight)
        layer.take(source.factors, source.codes)
        # Rounding the factors to fp16 can move a latent weight to another entry: set it to the weight of its own code.
        moved = layer.encode().index != source.codes
        layer.weight[moved] = decoded[moved]
    own = model.state_dict()
    unknown = sorted(n for n in state if n not in own and n.rpartition(".")[0] not in found and not n.endswith(TABLES))
    if unknown:
        raise UserError(f"{file}: {unknown[0]}: the model has no such weight ({len(unknown)} in all)")
    plain = {n: t for n, t in state.items() if n in own and (n.rpartition(".")[0] not in found or n.endswith(".bias"))}
    for name, tensor in plain.items():
        if own[name].shape != tensor.shape:
            raise UserError(f"{file}: {name} is {list(tensor.shape)}, the model's is {list(own[name].shape)}")
        own[name].copy_(tensor)
    return len(layers)


def said(layers: Mapping[str, Layer]) -> None:
    """Print how many layers' frozen codes were read, in the guide's words; its troubleshooting looks for them."""
    frozen = sum(1 for layer in layers.values() if layer.weight is None)
    if frozen:
        print(f"Manually loaded {frozen} _Q buffers")


def _codes(source: Layer, layer: LutLinear) -> Codes:
    tensors = {"lut": source.factors.table, "a": source.factors.a, "b": source.factors.b}
    return Codes(source.codes, layer.config.bits, tensors, (layer.out_features, layer.in_features))
