"""The rows of the table, kept as a file each: figures, where they came from, commit and processor."""

import dataclasses
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.real.measure import Quality
from wrinklefree.core.files import read_json, write_json
from wrinklefree.core.processor import processor
from wrinklefree.tracking.terminal import print_table


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    bits: float  # per weight of the blocks, scales and zeros counted
    bytes: int  # the whole file with the embedding at 8 bits
    ppl: float
    kl: float
    top1: float
    minutes: float  # to make it
    sample: dict[str, list[str]]
    source: str  # what was measured: a folder, or the settings of a peer
    commit: str = ""
    date: str = ""
    processor: str = ""
    threads: int = 1

    @classmethod
    def of(cls, name: str, quality: Quality, **values: Any) -> "Row":
        stamp: dict[str, Any] = {
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "threads": torch.get_num_threads(),
        }
        return cls(name=name, **dataclasses.asdict(quality), **values, **stamp, processor=processor())


@dataclass
class Store:
    """A folder with a JSON file for each row."""

    folder: Path
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(self.folder.glob("*.json")):
            row = Row(**read_json(file))
            self.rows[row.name] = row

    def put(self, row: Row) -> None:
        self.rows[row.name] = row
        write_json(self.folder / f"{row.name}.json", dataclasses.asdict(row))


def commit() -> str:
    """The commit of this checkout, with a plus sign if files differ from it."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()


def show(rows: Mapping[str, Row]) -> None:
    """Print the rows as a table, the smallest file first."""
    original = rows["original"].ppl
    ordered = sorted(rows.values(), key=lambda row: (row.bytes, row.ppl))
    head = ["", "bits", "MB", "perplexity", "ratio", "KL", "top-1", "minutes"]
    print_table(head, [cells(row, original) for row in ordered])


def cells(row: Row, original: float) -> list[str]:
    figures = [f"{row.bits:.2f}", f"{row.bytes / 1e6:.1f}", number(row.ppl), number(row.ppl / original)]
    return [row.name, *figures, f"{row.kl:.3f}", f"{row.top1:.1%}", f"{row.minutes:.1f}"]


def number(value: float) -> str:
    """Two decimals, or a power of ten if the number is large."""
    return f"{value:.2f}" if value < 10_000 else f"{value:.1e}"


def show_samples(rows: Mapping[str, Row]) -> None:
    """Print what the models write, side by side: under each prompt the models, each with greedy and sampled text."""
    for prompt in rows["original"].sample:
        print(f"\n{prompt} ...")
        for row in rows.values():
            for way, text in zip(("greedy", "sampled"), row.sample[prompt], strict=True):
                print(f"  {row.name:24} {way:8}{' '.join(text.split())[:86]}")
