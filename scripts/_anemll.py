"""What the scripts of the ANEMLL guide share: common flags, and how they run and report errors."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

import typer
from _flags import Flags

from wrinklefree import cli

MODEL = "Qwen/Qwen3-0.6B"
SIZES = ("lut_bits", "attn_lut_bits", "scale_rank", "attn_scale_rank")


def parser(description: str | None, writes: bool = True) -> argparse.ArgumentParser:
    """A parser with `--model-id`, and with `--force` for a script that writes."""
    flags = Flags(description=description)
    flags.add_argument("--model-id", "--model", default=MODEL, help="a config's name, a local folder or a hub id")
    if writes:
        flags.add_argument("--force", action="store_true", help="replace the output if it exists")
    return flags


def at_least(lowest: int) -> Callable[[str], int]:
    """A `type` for flags that take an integer of at least `lowest`."""

    def integer(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"{text} is less than {lowest}")
        return int(text)

    return integer


def add_sizes(flags: argparse.ArgumentParser) -> None:
    """Add flags for bits and ranks. The checkpoint has them already, so the flags only check it."""
    for name in SIZES:
        flags.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: the checkpoint's")


def sizes(args: argparse.Namespace) -> dict[str, int | None]:
    """The values of the flags that `add_sizes` adds."""
    return {name: getattr(args, name) for name in SIZES}


def settings(args: argparse.Namespace, table: Sequence[tuple[str, str]]) -> list[str]:
    """Settings `key=value` for the flags in `table`, a list of (flag, key). Flags without a value are left out."""
    values = vars(args)
    return [f"{key}={_text(values[name])}" for name, key in table if values[name] is not None]


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run(work: Callable[[], None]) -> None:
    """Call `work`, and exit with the code of the error that it reports, if there is one."""
    try:
        work()
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def tool(name: str, **settings: object) -> None:
    """Call the function `name` of `qat_lora.tools`. An error becomes one line on standard error.

    The module is imported only here, for two reasons: `--help` is instant, and libraries read the environment variables
    that turn off progress bars, which `cli.reported` sets, when they are imported.
    """
    run(lambda: cli.reported(lambda: vars(importlib.import_module("qat_lora.tools"))[name](**settings)))
