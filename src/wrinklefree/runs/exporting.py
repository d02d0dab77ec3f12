"""Writes the trained model of a run in another format, reads it back with that format's own library, and compares."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.base import LARGEST
from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.core.find import EXPORT_FORMATS, constant, find_module
from wrinklefree.data.open import heldout_batches
from wrinklefree.export.card import SAFETENSORS, TRANSFORMERS, Card, certificate, sizes
from wrinklefree.export.flags import formats, module_name
from wrinklefree.export.proof.certify import CERTIFY_TOKENS
from wrinklefree.families.architectures import positions
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model
from wrinklefree.runs.cards import card_of
from wrinklefree.runs.report import first_words
from wrinklefree.runs.setup import resolved_length
from wrinklefree.training import checkpoint


@dataclass(frozen=True)
class Opened:
    """A trained model, and the held-out text on which exports of it are compared."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: Config
    batches: list[Any]
    card: Card


def opened(run: Path, trust_remote_code: bool) -> Opened:
    """Load the model of a run. Raises UserError if it has none that was quantized."""
    folder, config = trained_by(run)
    model, tokenizer = load_model(folder, trust_remote_code=trust_remote_code)
    length = min(resolved_length(config), positions(model.config) or LARGEST)
    batches = heldout_batches(config.data, tokenizer, batch_size=1, length=length, max_tokens=CERTIFY_TOKENS)
    return Opened(model, tokenizer, config, list(batches), card_of(folder, config, model))


def trained_by(run: Path) -> tuple[Path, Config]:
    """The folder of a run's model, and the config that trained it. Raises UserError if it was not quantized."""
    folder = model_folder(run)
    return folder, _config(folder)


def write(source: Opened, format: str, target: Path, chosen: dict[str, Any]) -> list[list[str]]:
    """Write one format into `target` with its card, and return rows of what was read back and compared.

    Raises UserError if the format cannot hold the model, CertificateError if it is another one than was trained.
    """
    module = vars(find_module(EXPORT_FORMATS, module_name(formats()[format])))
    beginning = beginning_of(source, format, target, chosen)
    if "from_run" in module:
        chosen = module["from_run"](source.config, beginning, target) | chosen
    with written_aside(target) as aside:
        table: list[list[str]] = module["write"](source.model, source.tokenizer, aside, source.batches, **chosen)
        readme = aside / "README.md"
        if not readme.exists():
            weights = constant(formats()[format], "WEIGHTS", SAFETENSORS)
            parts = [beginning, sizes(source.model, aside, weights), certificate(format, table)]
            readme.write_text("\n".join(parts), encoding="utf-8")
    return table


def beginning_of(source: Opened, format: str, target: Path, chosen: dict[str, Any]) -> str:
    """The beginning of the model card of an export with the options `chosen`."""
    file = formats()[format]
    use = constant(file, "USE", f"`{constant(file, 'NEXT', '')}`".replace("{target}", "{name}"))
    options = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return source.card.beginning(
        use.format(name=target.name, prompt=first_words(source.config)),
        shlex.join(["--format", format, *options]),
        constant(file, "LIBRARY", TRANSFORMERS),
    )


def refuse_existing(target: Path, force: bool) -> None:
    """Raise UserError if there is something at `target` that may not be replaced."""
    if target.exists() and not force:  # checked first, because loading a large model takes minutes
        raise UserError(f"{target}: exists already; choose another with --out or give --force to replace it")


def next_step(format: str, target: Path, config: Config) -> str:
    """What to do with the written folder, as a line for a shell or for Python."""
    hint = constant(formats()[format], "NEXT", "")
    quoted = target if "'{target}" in hint else shlex.quote(str(target))
    return str(hint.format(target=quoted, prompt=first_words(config)))


def default_out(run: Path, format: str) -> Path:
    """The default folder of an export: `RUN/packed`, `RUN/gguf` and so on.

    For a checkpoint folder it is a sibling, such as `step_100-gguf`.
    """
    name = module_name(formats()[format]).replace("_", "-")
    return run / name if model_folder(run) != run else run.with_name(f"{run.name}-{name}")


def _config(folder: Path) -> Config:
    """The config that trained this checkpoint. Raises UserError if there is none, or it has no quantization method."""
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {checkpoint.CONFIG}, so not a checkpoint that `wf train` wrote")
    config = read_config(file)
    if config.method is None:
        raise UserError(
            f"{folder}: trained without quantization, so there is nothing to pack: {folder} is a plain model already"
        )
    return config
