"""The script of LLM-TRM's first phase, run in this process."""

import runpy
from pathlib import Path

import typer

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "src" / "train" / "phase1_compressor.py"))


def script(*words: str) -> int:
    """`python -m src.train.phase1_compressor` in this process; its exit code."""
    try:
        SCRIPT["cli"].reported(lambda: SCRIPT["carry_out"](SCRIPT["arguments"](list(words))))
    except typer.Exit as ended:
        return ended.exit_code
    return 0
