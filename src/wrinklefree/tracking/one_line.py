"""One line for a run among several: what the run prints goes into a file, and its last line is shown."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_TERMINAL_INTERVAL, _PIPE_INTERVAL = 0.25, 10.0  # seconds between looks at the file
_WARNING = "warning: "


@contextlib.contextmanager
def one_line(title: str, log: Path) -> Iterator[None]:
    """Add what the block and the processes that it starts print to the file `log`.

    Standard error gets the last line of it, behind `title`: on a terminal always in the same place, otherwise about
    every ten seconds. It gets each warning whole, and the file's name if the block fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = log.stat().st_size if log.exists() else 0
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as terminal:
        watcher = _Watcher(title, log, start, terminal)
        try:
            with log.open("a", encoding="utf-8", errors="replace", buffering=1) as file, _into(file):
                watcher.start()
                yield
        except BaseException:
            watcher.stop()
            print(f"what it printed is in {log}", file=terminal, flush=True)
            raise
        watcher.stop()


@contextlib.contextmanager
def _into(file: TextIO) -> Iterator[None]:
    """Make `file` standard output and standard error, of Python and of processes that the block starts."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = {number: os.dup(number) for number in (1, 2)}
    for number in kept:
        os.dup2(file.fileno(), number)
    try:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


class _Watcher:
    """Follows a file that grows, in a thread, and shows its last line."""

    def __init__(self, title: str, log: Path, start: int, out: TextIO) -> None:
        self.title, self.log, self.read, self.out = title, log, start, out
        self.last = ""
        self.rest = b""  # of a line that is not written to its end yet
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()
        self._look()
        if self.out.isatty():
            print("\r\x1b[K", end="", file=self.out, flush=True)

    def _follow(self) -> None:
        interval = _TERMINAL_INTERVAL if self.out.isatty() else _PIPE_INTERVAL
        while not self.ended.wait(interval):
            if self._look() or self.out.isatty():
                self._show()

    def _look(self) -> bool:
        """Read what is new, print the warnings in it, and say whether there is another last line."""
        with self.log.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        texts = [text for line in lines if (text := line.decode("utf-8", "replace").strip())]
        for text in texts:
            if text.startswith(_WARNING):
                print(("\r\x1b[K" if self.out.isatty() else "") + text, file=self.out, flush=True)
        self.last = texts[-1] if texts else self.last
        return bool(texts)

    def _show(self) -> None:
        text = f"{self.title}: {self.last}"
        if self.out.isatty():
            width = (os.get_terminal_size(self.out.fileno()).columns or 80) - 1
            text = text if len(text) <= width else text[: width - 1] + "…"
            print(f"\r{text}\x1b[K", end="", file=self.out, flush=True)
        else:
            print(text, file=self.out, flush=True)
