"""One line for a run among several."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from wrinklefree.tracking.one_line import one_line

# Prints a line by a process of its own, a warning, and at the end a line that does not fit.
ON_A_TERMINAL = """
import subprocess, sys, time
from pathlib import Path
from wrinklefree.tracking.one_line import one_line
with one_line("w2", Path(sys.argv[1])):
    subprocess.run(["echo", "step 1"], check=True)
    print("warning: the text is short", file=sys.stderr)
    print("step 2 " + "x" * 200)
    time.sleep(1)
print("done")
"""

INTO_A_PIPE = """
import sys, time
from pathlib import Path
from wrinklefree.tracking import one_line
one_line._PIPE_INTERVAL = 0.01
with one_line.one_line("run", Path(sys.argv[1])):
    print("step 1")
    print("warning: too few rows")
    print("step 2")
    time.sleep(1)
    print("warning: at the end")
"""


def test_what_a_block_and_its_processes_print_goes_into_the_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "logs" / "run.log"
    for word in ("first", "second"):
        with one_line("run", log):
            print(f"{word} from Python")
            print(f"{word} as an error", file=sys.stderr)
            subprocess.run(["echo", f"{word} from a process"], check=True)
    print("behind it")
    assert log.read_text().splitlines() == [
        f"{word} {rest}" for word in ("first", "second") for rest in ("from Python", "as an error", "from a process")
    ]
    out, err = capfd.readouterr()
    assert out == "behind it\n"
    assert err == ""


def test_a_pipe_gets_the_last_line_once_and_each_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-c", INTO_A_PIPE, str(tmp_path / "run.log")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [
        "warning: too few rows",
        "warning: at the end",
    ]
    assert lines.count("run: step 2") == 1  # a line that stays the last one is not repeated


def test_a_block_that_fails_says_where_its_words_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "run.log"

    def interrupted() -> None:
        with one_line("run", log):
            print("a reason")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capfd.readouterr().err == f"what it printed is in {log}\n"
    assert log.read_text() == "a reason\n"
    print("again")
    assert capfd.readouterr().out == "again\n"


def test_a_terminal_keeps_one_line_of_its_own_width(tmp_path: Path) -> None:
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("4H", 24, 40, 0, 0))  # rows and columns
    words = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "run.log")]
    subprocess.run(words, stdin=other, stdout=other, stderr=other, check=True, timeout=60)
    os.close(other)
    shown = b""
    while not shown.endswith(b"done\r\n"):
        shown += os.read(main, 4096)
    os.close(main)
    parts = shown.decode().split("\r")
    assert "warning: the text is short" in "".join(parts)
    assert any(part.startswith("w2: step 2") for part in parts)
    assert all(len(part.replace("\x1b[K", "")) < 40 for part in parts)
