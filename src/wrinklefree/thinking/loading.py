"""Read thinkers and language models from their folders, and check that they belong together."""

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.data.tokenizer import check_written_with
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.models.check import Contents, check_shapes, check_sizes, read_model_config
from wrinklefree.models.headers import read_header
from wrinklefree.models.load import load_pretrained
from wrinklefree.runs import prerequisites
from wrinklefree.thinking.hidden_pairs import Manifest
from wrinklefree.thinking.network import LatentThinker, ThinkerConfig
from wrinklefree.training import checkpoint

# Settings that a stage takes over from the thinker that it starts from.
INHERITED = ("d_compressed", "objective", "network")


def settings_of(config: Config) -> ThinkingConfig:
    """The section `thinking`. Raises UserError for a training that has none."""
    if config.thinking is None:
        raise UserError(f"training={config.training.stage}: not a stage of LLM-TRM; `wf train` runs it")
    return config.thinking


def is_thinker(path: Path) -> bool:
    """Whether a folder, or a run's folder, has a thinker and not a language model."""
    file = thinker_folder(path) / "config.json"
    return file.is_file() and read_model_config(file.parent).get("model_type") == ThinkerConfig.model_type


def thinker_folder(path: Path) -> Path:
    """The folder with the weights: `final/` of a run; NAME for `NAME.pt`, which is how the guide writes it."""
    folder = path if path.is_dir() else path.with_name(path.name.removesuffix(".pt"))
    return folder / "final" if (folder / "final").is_dir() else folder


def load_thinker(path: Path) -> tuple[LatentThinker, Config]:
    """A thinker in eval mode, and the config that made it.

    Raises UserError for anything that is not a whole thinker.
    """
    folder = thinker_folder(path)
    if not (folder / checkpoint.CONFIG).is_file():
        raise UserError(
            f"{path}: no thinker here ({checkpoint.CONFIG} is missing); `wf trm compressor` makes the first"
        )
    config = read_config(folder / checkpoint.CONFIG)
    if config.thinking is None:
        raise UserError(f"{path}: a model, not a thinker; give a folder that `wf trm` made")
    values = read_model_config(folder)
    header = read_header(folder / checkpoint.WEIGHTS)
    check_sizes(folder / "config.json", values, len(header))
    _check_fields(folder / "config.json", values)
    with refused_in_one_line(f"{folder / 'config.json'}: not the config of a thinker"):
        shape = ThinkerConfig(**values)
        with torch.device("meta"):
            skeleton = LatentThinker(shape)
    check_shapes(Contents(folder, values, header, None), skeleton)
    with refused_in_one_line(f"{folder / 'config.json'}: not the config of a thinker"):
        thinker = LatentThinker(shape)
    checkpoint.load_weights(folder, thinker)
    return thinker.eval(), config


def _check_fields(file: Path, values: dict[str, Any]) -> None:
    """Raises UserError if a field of a thinker's config has another type than its default, or counts less than 1."""
    defaults = {name: given.default for name, given in inspect.signature(ThinkerConfig).parameters.items()}
    for name in defaults.keys() & values.keys():
        value, kind = values[name], type(defaults[name])
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits or (kind is int and value < 1):
            raise UserError(f"{file}: {name}={value!r}: not the config of a thinker")


def inherit(config: Config, path: Path) -> LatentThinker:
    """The thinker that this stage starts from. What it has fixed (INHERITED) is written into `config`.

    Raises UserError if `config` sets one of these to something else.
    """
    thinker, before = load_thinker(path)
    mine, other, default = settings_of(config), settings_of(before), ThinkingConfig()
    for name in INHERITED:
        given, trained = vars(mine)[name], vars(other)[name]
        if given not in (vars(default)[name], trained):
            shown = dataclasses.asdict(trained) if dataclasses.is_dataclass(trained) else trained  # type: ignore[arg-type]
            raise UserError(f"thinking.{name}: {path} was made with {shown}; leave it out, or make that stage anew")
        setattr(mine, name, trained)
    return thinker


def starting_thinker(config: Config) -> Path:
    """The folder of the thinker that a stage goes on from. Raises UserError if the config names none."""
    start = prerequisites.starting_folder(config)
    if start is None:
        raise UserError("training.start_from: a value is required: the folder of the thinker to go on from")
    return start


def refuse_sharding(config: Config, what: str) -> None:
    """Raises UserError for a sharded training: the language model is frozen, and what is trained is small."""
    if config.distributed.strategy == "fsdp":
        raise UserError(f"distributed.strategy=fsdp: has no effect on {what}, whose language model is frozen")


def load_language_model(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen language model, in eval mode."""
    model, tokenizer = load_pretrained(config.model)
    return model.requires_grad_(False).eval(), tokenizer


def pairs_folder(config: Config) -> Path:
    """The folder of this experiment's hidden pairs."""
    return prerequisites.stage_folder(config, "trm_pairs")


def check_pairs(
    manifest: Manifest, folder: Path, thinker: LatentThinker, tokenizer: PreTrainedTokenizerBase, again: str
) -> None:
    """Check that the pairs have this tokenizer and compressor. Raises UserError, which ends with `again`, if not."""
    check_written_with(tokenizer, manifest.tokenizer_fingerprint, manifest.model, str(folder))
    if manifest.compressor_fingerprint != compressor_fingerprint(thinker):
        raise UserError(f"{folder}: made with another compressor: {again}")


def check_model(manifest: Manifest, folder: Path, model: PreTrainedModel, again: str) -> None:
    """Check that the pairs have this language model. Raises UserError, which ends with `again`, if not."""
    if manifest.model_fingerprint != model_fingerprint(model.state_dict()):
        raise UserError(f"{folder}: made with other weights than {manifest.model} has now: {again}")


def compressor_fingerprint(thinker: LatentThinker) -> str:
    """A fingerprint of the compressor's weights."""
    return fingerprint(model_fingerprint(thinker.compressor.state_dict()))
