"""Flags that the scripts of the ANEMLL guide share."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import typer

from wrinklefree import cli

MODEL = "Qwen/Qwen3-0.6B"
SIZES = ("lut_bits", "attn_lut_bits", "scale_rank", "attn_scale_rank")


def parser(description: str | None, writes: bool = True) -> argparse.ArgumentParser:
    """A parser with `--model-id`, and with `--force` for a script that writes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model-id", "--model", default=MODEL, help="a config's name, a local folder or a hub id")
    if writes:
        made.add_argument("--force", action="store_true", help="replace what is there")
    return made


def at_least(lowest: int) -> Callable[[str], int]:
    """The `type` of a flag that counts."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    return integer


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
    """Do it; the exit code is the script's."""
    try:
        work()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def tool(name: str, **settings: object) -> None:
    """Run `qat_lora.tools.NAME`, whose errors are a line.

    Imported only here: `--help` is instant, and libraries read on import that they are to draw no progress bars.
    """
    run(lambda: cli.reported(lambda: vars(importlib.import_module("qat_lora.tools"))[name](**settings)))
