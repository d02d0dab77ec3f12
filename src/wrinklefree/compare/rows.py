"""The rows of a comparison: the figures of one model each, kept as a file, and their means over seeds."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from wrinklefree.core.files import read_json, write_json


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one model."""

    method: str
    seed: int | None = None  # None for models that nobody trained
    bits: float  # per quantized weight, with its scales
    bits_per_parameter: float  # of the whole file
    coverage: float  # share of the weights in the decoder layers' matrices that is quantized
    bytes: int  # of the whole file
    ppl: float
    kl: float  # to the original, nats per token
    top1: float  # share of tokens with the same likeliest word as the original
    distinct: float  # share of the words in greedy text that are there once; text that loops has few
    agreement: float  # share of greedy tokens before the first that is not the original's
    tokens_per_second: float | None = None
    engine: str = ""
    memory: int | None = None  # bytes of weights in memory while decoding
    minutes: float = 0.0  # to make it
    tokens: int = 0  # that the whole model was trained on, after its blocks
    samples: dict[str, str] = field(default_factory=dict)  # greedy text by prompt
    curve: list[tuple[float, float]] = field(default_factory=list)  # minutes, KL of the training
    measured_on: str = ""  # fingerprint of the test
    source: str = ""  # fingerprint of the run
    processor: str = ""
    version: str = ""

    @property
    def name(self) -> str:
        return self.method if self.seed is None else f"{self.method}-{self.seed}"


ROW = TypeAdapter(Row)


@dataclass
class Store:
    """A folder with a JSON file for each row. Without `keeps`, rows of earlier comparisons do not count."""

    folder: Path
    keeps: bool = True

    def get(self, name: str, measured_on: str, source: str = "") -> Row | None:
        """The row of a model, if it was measured on the same test and comes from the same run; else None."""
        file = self.folder / f"{name}.json"
        if not self.keeps or not file.is_file():
            return None
        try:
            row = ROW.validate_python(read_json(file))
        except ValidationError:  # of another version
            return None
        return row if (row.measured_on, row.source) == (measured_on, source) else None

    def put(self, row: Row) -> Row:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"{row.name}.json", dataclasses.asdict(row))
        return row


@dataclass(frozen=True)
class Group:
    """The rows of one method with several seeds."""

    method: str
    rows: Sequence[Row]

    def mean(self, figure: str) -> float:
        return statistics.mean(getattr(row, figure) for row in self.rows)

    def spread(self, figure: str) -> float:
        """The standard deviation over the seeds; 0 if there is one."""
        values = [getattr(row, figure) for row in self.rows]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    @property
    def first(self) -> Row:
        return self.rows[0]


def grouped(rows: Iterable[Row]) -> list[Group]:
    """The rows by method, the smallest file first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    groups = [Group(method, members) for method, members in found.items()]
    return sorted(groups, key=lambda group: (group.mean("bytes"), group.mean("kl")))


def dominated(groups: Sequence[Group], figure: str) -> set[str]:
    """The methods for which there is another with no more bytes and no worse figure, and one of both better."""
    points = {group.method: (group.mean("bytes"), group.mean(figure)) for group in groups}
    return {
        name
        for name, point in points.items()
        if any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points.values())
    }
