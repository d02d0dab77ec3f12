"""Flags that the scripts of the ANEMLL guide share."""

import argparse
import sys
from collections.abc import Callable, Sequence

import typer

from wrinklefree import cli

MODEL = "Qwen/Qwen3-0.6B"
SIZES = ("lut_bits", "attn_lut_bits", "scale_rank", "attn_scale_rank")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--model-id` and `--force`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model-id", "--model", default=MODEL, help="a config's name, a local folder or a hub id")
    made.add_argument("--force", action="store_true", help="replace what is there")
    return made


def add_sizes(made: argparse.ArgumentParser) -> None:
    """Bits and ranks, which the checkpoint knows: given, they are checked."""
    for name in SIZES:
        made.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: what the checkpoint has")


def sizes(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(args, name) for name in SIZES}


def settings(args: argparse.Namespace, table: Sequence[tuple[str, str]]) -> list[str]:
    """`key=value` for every flag of the table that was given, or has a default."""
    values = vars(args)
    return [f"{key}={_text(values[name])}" for name, key in table if values[name] is not None]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run(work: Callable[[], None]) -> None:
    """Do it; errors are a line, and the exit code the script's."""
    try:
        cli.reported(work)
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
