"""What `wf` shows in a terminal of 80 columns: nothing is too wide, NO_COLOR is heeded, and a shell completes."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from product.test_code_blocks import read
from toyrun import toy_files

from wrinklefree.cli import EXAMPLES, SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_of_a_section_is_of_one_of_its_verbs_and_is_read(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    verb = EXAMPLES[section].split()[1]
    assert verb in SECTIONS[section]
    read(EXAMPLES[section].replace("FOLDER", "./toy").replace("TEXTS", "text"))


def on_a_terminal(*words: str, code: int = 0, **environment: str) -> str:
    """What Python writes to a terminal of 80 columns, until it ends with an exit code."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    settings = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    started = subprocess.Popen([sys.executable, *words], stdout=slave, stderr=slave, stdin=slave, env=settings)
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # how Linux ends a terminal
        while piece := os.read(master, 4096):
            written += piece
    os.close(master)
    assert started.wait() == code
    return written.decode()


def lines(written: str) -> list[str]:
    """The lines as a person sees them, those that a bar writes over included."""
    return re.sub("\x1b\\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").splitlines()


BAR = """
from wrinklefree.tracking.progress import Bar
bar = Bar(2000, 0)
bar.show(1000, "loss 12.345  lr 1.0e-04  12.3k tok/s  ETA 1:00:00")
bar.close()
"""
COLOUR = re.compile("\x1b\\[(?:[0-9;]*;)?(?:3[0-9]|4[0-9]|9[0-7])(?:;[0-9;]*)?m")
STYLE = re.compile("\x1b\\[[0-9;]*m")  # bold and dim, too


def test_a_bar_has_colour_unless_no_color_is_set() -> None:
    assert COLOUR.search(on_a_terminal("-c", BAR))
    plain = on_a_terminal("-c", BAR, NO_COLOR="1")
    assert not STYLE.search(plain)
    [*_, last] = [line for line in lines(plain) if line.strip()]
    assert "1000/2000" in last
    assert "ETA 1:00:00" in last
    assert len(last) <= 80


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("runs", 0),
        ("--help", 0),
        ("runs --help", 0),
        ("doctor", 0),
        ("methods", 0),
        ("cancel nothing", 2),
        ("nothing", 2),
    ],
)
def test_with_no_color_nothing_is_styled(
    words: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    (tmp_path / "outputs" / "a" / "training_log.csv").write_text("step,train_loss,eval_loss\n3,1.5,\n")
    monkeypatch.chdir(tmp_path)
    shown = on_a_terminal("-m", "wrinklefree.cli", *words.split(), code=code, NO_COLOR="1", HF_HUB_OFFLINE="1")
    assert shown
    assert "\x1b[" not in shown


@pytest.mark.parametrize("verb", ["methods", "doctor"])
def test_a_report_is_whole_and_fits(verb: str) -> None:
    shown = lines(on_a_terminal("-m", "wrinklefree.cli", verb, NO_COLOR="1", HF_HUB_OFFLINE="1"))
    assert [line for line in shown if len(line) > 80] == []
    assert not any("…" in line for line in shown)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("wf f", ["fairy2"]), ("wf anemll --wo", ["--workflow"]), ("wf anemll --workflow ", ["a", "b", "c"])],
)
def test_a_shell_completes_verbs_options_and_choices(typed: str, offered: list[str]) -> None:
    asked = {"_WF_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", "from wrinklefree.cli import main; main()"]
    answer = subprocess.run(command, env=os.environ | asked, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == offered


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    command = [sys.executable, "-c", "from wrinklefree.cli import main; main()"]
    asked = os.environ | {"_WF_COMPLETE": f"source_{shell}"}  # whatever shell the tests are run by
    assert "_WF_COMPLETE" in subprocess.run(command, env=asked, capture_output=True, text=True, check=True).stdout
