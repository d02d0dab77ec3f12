"""What `wf wandb-status` asks a stand-in of the client for, and what it says if there is no answer."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from wrinklefree.cli import app

PAGE = "https://wandb.test/me/wrinklefree-fairy2/runs"


class CommError(Exception):
    """The client's own."""


def run_called(name: str, **figures: Any) -> Any:
    return SimpleNamespace(
        name=name, state="running", summary=figures, heartbeatAt="2026-11-27T16:30:12", url=f"{PAGE}/{name}"
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the client was asked; it knows three runs, of which the last has written nothing yet."""
    calls: list[Any] = []
    known = [run_called("w2", _step=120, train_loss=2.34567, lr=1e-4), run_called("w1", _step=7), run_called("new")]

    class Api:
        def __init__(self, timeout: float) -> None:
            calls.append(timeout)

        def runs(self, path: str, order: str, per_page: int) -> list[Any]:
            calls.append((path, order, per_page))
            if "gone" in path:
                raise CommError(f"Could not find project {path}\nmore lines")
            return [] if "empty" in path else known

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=Api, Error=CommError))
    monkeypatch.setenv("WANDB_API_KEY", "a-key")
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    return calls


def status(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["wandb-status", *words])
    return result.exit_code, result.stdout, result.stderr


def test_the_newest_runs_of_a_project(asked: list[Any]) -> None:
    code, out, _ = status("-p", "wrinklefree-fairy2", "-e", "me", "-n", "2")
    assert code == 0
    assert asked[1] == ("me/wrinklefree-fairy2", "-created_at", 2)
    lines = out.splitlines()
    assert lines[1].split() == ["w2", "running", "120", "2.346", "0.0001", "2026-11-27", "16:30"]
    assert lines[2].split()[:3] == ["w1", "running", "7"]
    assert lines[-2:] == [f"{PAGE}/w2", f"{PAGE}/w1"]
    assert "new" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [(["-p", "gone"], "gone: Could not find project gone"), (["-p", "empty"], "empty: no runs there")],
)
def test_no_answer_is_one_line(asked: list[Any], words: list[str], said: str) -> None:
    assert status(*words) == (2, "", f"error: {said}\n")


def test_a_key_is_asked_for_before_anything_is_sent(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    code, _, err = status("-p", "wrinklefree-fairy2")
    assert (code, asked) == (2, [])
    assert "WANDB_API_KEY is not set" in err
