"""The results of a run: the measured figures, and how they are shown as a table and in the model card."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from wrinklefree.config.base import first_problem
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.evaluate.accuracy import Accuracy
from wrinklefree.evaluate.perplexity import Quality
from wrinklefree.tracking.terminal import markdown_table, print_table, short_number, short_size

CODE, PROSE = "def ", "The "  # how the model is asked to begin in the commands that a report offers

RESULTS = "results.json"  # written after all else, so a run that has it is done

STATES = ("full_precision", "one_shot", "trained")  # of the model; these are the columns of the table


@dataclass
class Results:
    """The figures of a run, filled in as they are measured and saved in `results.json`."""

    context: int = 0  # tokens per window of the held-out figures
    full_precision: Quality | None = None
    one_shot: Quality | None = None
    trained: Quality | None = None
    accuracy: dict[str, Accuracy] = field(default_factory=dict)  # accuracy on the task for each of STATES
    original_bytes: int = 0  # size of the original model in bf16
    original_linear_bytes: int = 0  # the part of it that was quantized
    packed_bytes: int = 0
    packed_linear_bytes: int = 0
    bits_per_quantized_weight: float = 0.0
    quantized_share: float = 0.0  # of the blocks' weights
    bits_per_weight: float = 0.0
    rebuilt: bool = False  # whether `one_shot` is the model after its blocks were rebuilt, not a plain quantization
    training: dict[str, Any] = field(default_factory=dict)  # what `training_facts` collects
    minutes: float = 0.0  # of the process that wrote this, all included
    tokens_per_second: dict[str, float] = field(default_factory=dict)  # greedy decoding, batch 1

    def save(self, path: Path) -> None:
        """Write the figures to `path` as JSON, with perplexities and accuracies computed."""
        values = dataclasses.asdict(self)
        for name in STATES:
            quality: Quality | None = getattr(self, name)
            values[name] = None if quality is None else {**values[name], "ppl": quality.ppl}
        for name, accuracy in self.accuracy.items():
            values["accuracy"][name] |= {"value": accuracy.value, "interval": accuracy.interval}
        write_json(path, values)

    def rows(self) -> list[list[str]]:
        """The table: one row per figure, one column per state of the model."""
        table = self.quality_rows()
        if self.packed_bytes:
            table += [
                ["whole file", short_size(self.original_bytes), "", short_size(self.packed_bytes)],
                ["quantized layers", short_size(self.original_linear_bytes), "", short_size(self.packed_linear_bytes)],
                ["bits per quantized weight", "16", "", f"{self.bits_per_quantized_weight:.3f}"],
                ["of the blocks' weights, quantized", "", "", f"{self.quantized_share:.1%}"],
                ["bits per weight, whole file", "16", "", f"{self.bits_per_weight:.3f}"],
                ["tokens/s, greedy", self._speed("full_precision"), "", self._speed("packed")],
            ]
        return table

    def quality_rows(self) -> list[list[str]]:
        """The rows that are about the model, and not about the packed folder of its run."""
        table = [
            ["held-out perplexity", *(_ppl(q) for q in self._qualities())],
            ["KL to full precision, nats/token", *(_kl(q) for q in self._qualities())],
        ]
        if self.accuracy:
            table.append(["accuracy", *(_share(self.accuracy.get(name)) for name in STATES)])
        return table

    def _qualities(self) -> list[Quality | None]:
        return [self.full_precision, self.one_shot, self.trained]

    def _speed(self, name: str) -> str:
        return short_number(self.tokens_per_second[name])

    def print(self) -> None:
        """Print the table."""
        print_table(["", "full precision", self._start(), "trained"], self.rows())

    def _start(self) -> str:
        return "rebuilt" if self.rebuilt else "one-shot"

    def markdown(self) -> str:
        """The model's figures as a section of its card, which adds the sizes of the file that it is about."""
        table = markdown_table(["", "full precision", f"quantized, {self._start()}", "trained"], self.quality_rows())
        assert self.full_precision is not None
        measured_on = f"On {self.full_precision.tokens:,} held-out tokens in windows of {self.context}."
        return "\n".join(["## Quality", "", measured_on, "", table, ""])


def training_rows(training: Mapping[str, Any]) -> dict[str, str]:
    """Rows of the model card on a training, from `Results.training`."""
    if not training:
        return {}
    if not training["steps"]:
        return {"training": "blocks, one by one"}
    rows = {
        "training": "{steps:,} steps, {tokens:,} tokens in rows of {length}".format_map(training),
        "learning rate": "{lr:.2g}, schedule {schedule}".format_map(training),
        "precision": training["precision"],
    }
    return rows if training["loss"] is None else rows | {"last training loss": f"{training['loss']:.4f}"}


def read_results(path: Path) -> Results:
    """Read the `results.json` of a finished run, of this version or an earlier one.

    Raises UserError if it is missing or broken.
    """
    values = read_figures(path)
    try:
        return TypeAdapter(Results).validate_python(
            {f.name: values[f.name] for f in fields(Results) if f.name in values}
        )
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}: not the results of a run") from error


def _ppl(quality: Quality | None) -> str:
    return "" if quality is None else f"{quality.ppl:.2f}"


def _kl(quality: Quality | None) -> str:
    return "" if quality is None or quality.kl == 0 else f"{quality.kl:.4f}"


def _share(accuracy: Accuracy | None) -> str:
    return "" if accuracy is None else f"{accuracy.value:.1%}"


def first_words(config: Config) -> str:
    """What a model of this run may go on with, quoted for a shell: code if it has learned the library's, else prose."""
    is_code = config.data.source == "stdlib" or config.model.name == "tiny"
    return f"'{CODE if is_code else PROSE}'"


def read_figures(path: Path) -> dict[str, Any]:
    """Read the `results.json` of a finished run. Raises UserError if it is missing or broken."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the results of a run")
    return values
