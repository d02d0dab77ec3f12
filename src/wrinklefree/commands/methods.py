"""`wf methods`: what there is to quantize with, read from the files themselves."""

import importlib
import re

from wrinklefree.config.compose import CONFIGS
from wrinklefree.core import method
from wrinklefree.tracking.terminal import print_table


def run() -> None:
    """Print every method's name, the first line of its documentation, and the training configs that use it."""
    names = method.available()
    print_table(["method", "what it does", "training="], [[n, _summary(n), ", ".join(_trainings(n))] for n in names])


def _summary(name: str) -> str:
    doc = importlib.import_module(f"{method.METHODS}.{name}").__doc__ or ""
    return doc.strip().partition("\n")[0]


def _trainings(name: str) -> list[str]:
    """Training configs that choose this method in their defaults list."""
    chooses = re.compile(rf"override /method:\s*{re.escape(name)}\s*$", re.MULTILINE)
    files = sorted((CONFIGS / "training").glob("*.yaml"))
    return [file.stem for file in files if chooses.search(file.read_text(encoding="utf-8"))]
