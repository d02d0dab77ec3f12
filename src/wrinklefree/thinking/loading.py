"""Thinkers and language models from their folders, checked against one another."""

import dataclasses
import json
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.manifest import fingerprint, model_fingerprint, tokenizer_fingerprint
from wrinklefree.models.check import check_safetensors
from wrinklefree.models.load import load_pretrained
from wrinklefree.runs import prerequisites
from wrinklefree.thinking.hidden_pairs import Manifest
from wrinklefree.thinking.network import LatentThinker, ThinkerConfig
from wrinklefree.training import checkpoint

# What a later stage takes over from the one it starts from, where it is not set anew.
INHERITED = ("d_compressed", "objective", "network")


def settings_of(config: Config) -> ThinkingConfig:
    """The section `thinking`. Raises UserError for a training that has none."""
    if config.thinking is None:
        raise UserError(f"training={config.training.stage}: not a stage of LLM-TRM; `wf train` runs it")
    return config.thinking


def is_thinker(path: Path) -> bool:
    """Whether there is a thinker in a folder or run, and not a language model."""
    file = _folder(path) / "config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("model_type") == ThinkerConfig.model_type


def _folder(path: Path) -> Path:
    """`NAME.pt`, as the guide writes it, is the folder NAME; of a run, `final/`."""
    folder = path if path.is_dir() else path.with_name(path.name.removesuffix(".pt"))
    return folder / "final" if (folder / "final").is_dir() else folder


def load_thinker(path: Path) -> tuple[LatentThinker, Config]:
    """A thinker in eval mode, and the config it was made with.

    Raises UserError for anything that is not a whole thinker.
    """
    folder = _folder(path)
    if not (folder / checkpoint.CONFIG).is_file():
        raise UserError(
            f"{path}: no thinker here ({checkpoint.CONFIG} is missing); `wf trm compressor` makes the first"
        )
    config = read_config(folder / checkpoint.CONFIG)
    if config.thinking is None:
        raise UserError(f"{path}: a model, not a thinker; give a folder that `wf trm` made")
    shape = ThinkerConfig.from_json_file(folder / "config.json")
    check_safetensors(folder / checkpoint.WEIGHTS)
    thinker = LatentThinker(shape)
    checkpoint.load_weights(folder, thinker)
    return thinker.eval(), config


def inherit(config: Config, path: Path) -> LatentThinker:
    """The thinker that this stage starts from; settings that it fixes are written into `config`.

    Raises UserError where one is set to something else.
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


def load_language_model(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen language model, in eval mode."""
    model, tokenizer = load_pretrained(config.model)
    return model.requires_grad_(False).eval(), tokenizer


def pairs_folder(config: Config) -> Path:
    """Where this experiment's hidden pairs are."""
    return prerequisites.stage_folder(config, "trm_pairs")


def check_pairs(manifest: Manifest, folder: Path, thinker: LatentThinker, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for pairs of another tokenizer or compressor."""
    if manifest.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer):
        raise UserError(f"{folder}: made with another tokenizer than this model's; run `wf trm pairs` for this model")
    if manifest.compressor_fingerprint != compressor_fingerprint(thinker):
        raise UserError(f"{folder}: made with another compressor; run `wf trm pairs --force` with this one")


def check_model(manifest: Manifest, folder: Path, model: PreTrainedModel) -> None:
    """Raises UserError for pairs of another language model."""
    if manifest.model_fingerprint != model_fingerprint(model.state_dict()):
        raise UserError(f"{folder}: made with other weights than {manifest.model} has now; run `wf trm pairs --force`")


def compressor_fingerprint(thinker: LatentThinker) -> str:
    return fingerprint(model_fingerprint(thinker.compressor.state_dict()))
