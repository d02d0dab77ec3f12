"""From Python what the commands do: `quantize` a model, train it, export it.

Each step is an ordinary run: the same settings, loop, checkpoints and proofs as `wf train` and `wf export`.
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from wrinklefree.config.compose import load_config, read_yaml
from wrinklefree.config.groups import option_files, options
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.text import did_you_mean
from wrinklefree.export.flags import check_package, formats
from wrinklefree.models.load import Loaded, open_tokenizer
from wrinklefree.runs import exporting, rebuilding, setup
from wrinklefree.runs.report import Results
from wrinklefree.runs.stage import calibration, prepare_student, train_opened

TEXTS = "texts"  # in `output_root`: the texts that callers gave, each list in a file of its own

# The training that stands for a method: one stage, from the original, with one objective.
TRAININGS = {"fairy2": "fairy2_w2", "bitdistill": "ternary", "anemll": "anemll_q2a4", "uniform": "uniform_w4"}


@dataclass
class Quantized:
    """A quantized model that can be trained and exported. `model` is an ordinary model of transformers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    original: PreTrainedModel  # in fp32 and frozen; the training's teacher
    folder: Path  # what `train` writes into
    settings: list[str]  # KEY=VALUE
    method: Any  # its config, with what `auto` came to
    results: Results | None = None  # of the last training

    def train(self, *settings: str, steps: int | None = None, minutes: float | None = None) -> Self:
        """Train the model for so many steps or minutes; by default as long as `wf train` would.

        `settings` are KEY=VALUE, as for the commands. Checkpoints, log and results are in `folder`, where they replace
        those of an earlier training of this model. Raises UserError for anything that the caller can fix.
        """
        length = [] if steps is None else [f"training.max_steps={steps}"]
        length += [] if minutes is None else [f"training.max_minutes={minutes}"]
        config = load_config([*self.settings, "training.pack=false", *length, *settings])
        config.method = self.method
        with setup.open_run(config, force=True, given=(self.original, self.tokenizer)) as run:
            self.results = train_opened(run, made=self.model)
        self.model.eval()
        return self

    def export(self, folder: str | Path, format: str = "hf", force: bool = False, **chosen: Any) -> Path:
        """Write the model into `folder`, read it back and compare, as `wf export` does; return the folder.

        `chosen` are options of the format, such as `head_bits=8`. What was not trained is evaluated and saved first.
        Raises UserError if the folder exists, unless `force` is given, or if the format cannot hold the model.
        """
        target = Path(folder)
        known = formats()
        if format not in known:
            raise UserError(f"format={format}: unknown{did_you_mean(format, known)}; there are {', '.join(known)}")
        check_package(format)
        exporting.refuse_existing(target, force)
        if self.results is None:
            self.train(steps=0)
        exporting.write(exporting.opened(self.folder, trust_remote_code=False), format, target, chosen)
        return target


def quantize(
    model: str | Path | PreTrainedModel,
    method: str = "fairy2",
    *settings: str,
    bits: float | None = None,
    texts: str | Path | Iterable[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    folder: str | Path | None = None,
    force: bool = False,
) -> Quantized:
    """Quantize a model as the first half of `wf train` does: calibrated codes, blocks rebuilt one by one.

    model       a config's name, a folder, a hub id, or a model in memory, which stays as it is: a copy is quantized
    method      a method, or a training that `wf methods` lists
    settings    KEY=VALUE, as for the commands
    bits        per weight; None takes those of the method's usual training
    texts       to learn from: a list of texts, or a file or folder. Without them the model writes its own
    tokenizer   of a model in memory; by default the one beside its files
    folder      of the run; by default as for `wf train`
    force       replaces an earlier run in that folder

    Raises UserError for anything that the caller can fix.
    """
    given = None if isinstance(model, str | Path) else in_memory(model, tokenizer)
    chosen = [*_model_settings(model), f"training={training_for(method, bits)}"]
    chosen += [] if folder is None else [setting("output_dir", str(folder))]
    chosen += [*_text_settings(texts, load_config([*chosen, *settings]).output_root), *settings]
    config = load_config([*chosen, "training.max_steps=0"])
    with setup.open_run(config, force, given=given) as run:
        student = prepare_student(config, run.model, calibration(config, run.tokenizer))
        if config.rebuilds:
            run.begin()
            rebuilding.rebuild(run, run.model, student)
        return Quantized(student.eval(), run.tokenizer, run.model, run.out, _kept(chosen, config), config.method)


def _kept(chosen: list[str], config: Config) -> list[str]:
    """The settings of later runs: the same text, if the model wrote it."""
    return [*chosen, setting("data.path", config.data.path)] if config.data.source == "self" else chosen


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Loaded:
    """A frozen fp32 copy of a model in memory, and its tokenizer. Raises UserError if no tokenizer is known."""
    if tokenizer is None and not model.name_or_path:
        raise UserError("tokenizer=...: a value is required: the model was not loaded from anywhere")
    original = copy.deepcopy(model).float().eval().requires_grad_(False)
    return original, tokenizer or open_tokenizer(model.name_or_path)


def _model_settings(model: str | Path | PreTrainedModel) -> list[str]:
    if isinstance(model, str | Path):
        return [setting("model", str(model))]
    name = model.name_or_path or type(model).__name__
    return ["model=pretrained", setting("model.name", Path(name).name), setting("model.pretrained", name)]


def _text_settings(texts: str | Path | Iterable[str] | None, output_root: str) -> list[str]:
    """The settings that name the text. A list is written to a file, so that a run can go on with it."""
    if texts is None:
        return []
    if not isinstance(texts, str | Path):
        rows = [json.dumps({"text": text}) for text in texts]
        texts = Path(output_root) / TEXTS / f"{fingerprint(rows)}.jsonl"
        texts.parent.mkdir(parents=True, exist_ok=True)
        with file_aside(texts) as aside:
            aside.write_text("\n".join(rows), encoding="utf-8")
    return ["data=local", setting("data.path", str(texts))]


def training_for(method: str, bits: float | None) -> str:
    """The training that a method's name and its bits mean. Raises UserError if there is none."""
    known = options("training")
    if method not in TRAININGS and method not in known:
        names = [*TRAININGS, *known]
        raise UserError(f"{method}: no such method or training{did_you_mean(method, names)}; see `wf methods`")
    usual = TRAININGS.get(method, method)
    if bits is None or _bits(usual) == bits:
        return usual
    found = {name: _bits(name) for name in known if method in TRAININGS and _starts_anew(name, method)}
    fitting = [name for name, own in found.items() if own == bits]
    if not fitting:
        there = ", ".join(f"{name} ({own:g})" if own else name for name, own in found.items()) or usual
        raise UserError(f"bits={bits:g}: {method} has no training with so many; give one of {there} as method")
    return fitting[0]


def _bits(training: str) -> float | None:
    method = load_config([f"training={training}"]).method
    bits: float | None = None if method is None else method.weight_bits
    return bits


def _starts_anew(training: str, method: str) -> bool:
    """Whether a training quantizes with `method`, starts from the original, and trains the model as a whole."""
    file = next(path for path in option_files("training") if path.stem == training)
    if {"override /method": method} not in read_yaml(file).get("defaults", []):
        return False
    config = load_config([f"training={training}"])
    return not config.training.start_from and config.training.max_steps != 0
