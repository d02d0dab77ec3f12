"""What is compared: which methods, with which seeds, each an ordinary run in a folder of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wrinklefree.config.compose import load_config
from wrinklefree.config.groups import options
from wrinklefree.config.schema import Config
from wrinklefree.config.values import setting
from wrinklefree.core.errors import UserError
from wrinklefree.runs.quantized import TRAININGS

METHODS = ("fairy2_w2", "fairy2_w1", "bitdistill", "anemll_q2a4")  # by default

# Settings that all runs share unless the user says otherwise: a small file needs a small embedding too.
COMMON = ("distillation=logits", "export.head_bits=8")

SEED = 42  # of the first run of each method


@dataclass(frozen=True)
class Entry:
    """One run of the comparison."""

    method: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path

    @property
    def name(self) -> str:
        """The name of its row, such as `fairy2_w2-42`."""
        return f"{self.method}-{self.seed}"

    def config(self) -> Config:
        """Raises UserError if its settings are wrong."""
        return load_config(list(self.overrides))


def entries(
    model: str, methods: Sequence[str], seeds: int, steps: int | None, overrides: Sequence[str], out: Path
) -> list[Entry]:
    """All runs: first each method with the first seed, then each with the second, and so on.

    Raises UserError if a method is unknown, does not quantize, or is named twice, or if settings are wrong.
    """
    twice = next((name for name in methods if methods.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--methods: {twice} is named twice")
    length = [] if steps is None else [f"training.max_steps={steps}"]
    found = []
    for seed in range(SEED, SEED + seeds):
        for method in methods:
            folder = out / "runs" / f"{method}-{seed}"
            ours = [setting("model", model), f"training={_training(method)}", *COMMON, *length, f"seed={seed}"]
            found.append(Entry(method, seed, (*ours, *overrides, setting("output_dir", str(folder))), folder))
    for entry in found[: len(methods)]:
        _check(entry)
    return found


def with_bits(entry: Entry, name: str, per_layer: Sequence[str]) -> Entry:
    """The run of `entry` under another name, with bits by layer."""
    folder = entry.folder.with_name(f"{name}-{entry.seed}")
    more = (setting("method.per_layer", list(per_layer)), setting("output_dir", str(folder)))
    return Entry(name, entry.seed, (*entry.overrides, *more), folder)


def _training(method: str) -> str:
    name = TRAININGS.get(method, method)
    if name not in options("training"):
        known = ", ".join(dict.fromkeys([*METHODS, *options("training")]))
        raise UserError(f"--methods {method}: no such method or training; there are {known}")
    return name


def _check(entry: Entry) -> None:
    config = entry.config()
    if config.method is None:
        raise UserError(f"--methods {entry.method}: quantizes nothing")
    if config.training.start_from:
        raise UserError(f"--methods {entry.method}: is a stage that needs others; compare stages that start anew")
