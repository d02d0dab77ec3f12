"""Print results: tables and short numbers that fit into 80 columns, and plain log lines."""

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

UNITS = {86_400: "days", 3600: "hours", 60: "minutes"}

# Columns of output to a file or a pipe: wide enough that nothing is wrapped.
_UNWRAPPED_WIDTH = 240


def console() -> Console:
    """A console on standard output, as wide as the terminal. Output to a file or pipe is not wrapped or coloured."""
    width = None if sys.stdout.isatty() else _UNWRAPPED_WIDTH
    # With NO_COLOR alone, rich leaves out colours, but still prints codes for bold and dim text.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(width=width, highlight=False, color_system=colours)


@contextlib.contextmanager
def printed_aside() -> Iterator[None]:
    """Send what the block and the processes that it starts print to standard error. Standard output stays empty."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print aligned columns. A column is aligned right if each of its cells is empty or starts with a digit."""
    cells = [list(row) for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, header in enumerate(headers):
        numeric = all(row[i][:1].isdigit() for row in cells if row[i])
        table.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return the lines of a Markdown table, for model cards."""
    head, *body = ["|".join(["", *(f" {cell} " if cell else " " for cell in row), ""]) for row in [headers, *rows]]
    return "\n".join([head, "|" + "---|" * len(headers), *body])


def print_hanging(label: str, text: str) -> None:
    """Print `text` to the right of `label`. On a terminal, it is wrapped within its own column."""
    indent = " " * len(label)
    wrapper = textwrap.TextWrapper(console().width, label, indent, break_long_words=False, break_on_hyphens=False)
    print("\n".join(wrapper.wrap(text)), flush=True)


def short_number(value: float) -> str:
    """Three significant digits with a unit: 950, 12.3k, 4.56M, 10.0B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{_three_digits(value / limit)}{unit}"
    return f"{value:.0f}"


def short_size(num_bytes: float) -> str:
    """Bytes in decimal units, as disks and model cards count them: 812 B, 12.1 MB."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= limit * 0.9995:
            return f"{_three_digits(num_bytes / limit)} {unit}"
    return f"{num_bytes:.0f} B"


def short_time(seconds: float) -> str:
    """Hours, minutes and seconds: 0:03:12."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def spoken_time(seconds: float) -> str:
    """A length of time as one would say it: 45 seconds, 12 minutes, 5.2 hours, 103 days."""
    for limit, unit in ((172_800, 86_400), (7200, 3600), (120, 60)):
        if seconds >= limit:
            return f"{_three_digits(seconds / unit).removesuffix('.00').removesuffix('.0')} {UNITS[unit]}"
    return f"{seconds:.0f} second{'' if round(seconds) == 1 else 's'}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


class LineHandler(logging.Handler):
    """Writes log records as plain lines to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        # `sys.stderr` is looked up for each record, because a live progress bar redirects it.
        prefix = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        print(prefix + self.format(record), file=sys.stderr, flush=True)


def show_log_lines() -> None:
    """Make the `wrinklefree` logger print to standard error, once, whatever the root logger does."""
    log = logging.getLogger("wrinklefree")
    is_main = os.environ.get("RANK", "0") == "0"  # of torchrun's processes, only the first logs
    log.setLevel(logging.INFO if is_main else logging.ERROR)
    log.propagate = False
    if not any(isinstance(handler, LineHandler) for handler in log.handlers):
        log.addHandler(LineHandler())
