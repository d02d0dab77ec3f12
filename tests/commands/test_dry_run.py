"""Dry runs of what prepares a training: they say what would be read and written, write nothing, and are right."""

import json
import re
from pathlib import Path

import pytest
from toyrun import toy_files
from typer.testing import CliRunner, Result

from wrinklefree.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ran(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*words])
    assert result.exit_code == code, result.output
    return result


CACHE = ["cache", "-m", "./toy", "--out", "cache", "--topk", "8", "--length", "16", "--sequences", "24"]
CACHE += ["--heldout", "4", "data=local", "data.path=text"]


def test_a_cache_is_as_large_as_its_dry_run_says(here: Path) -> None:
    said = ran(*CACHE, "--dry-run").stderr
    assert not (here / "cache").exists()
    assert "asks it about at most 448 tokens: 24 sequences of 16 to train on, 4 held out" in said
    [size] = re.findall(r"writes at most ([\d.]+) kB into cache/", said)
    ran(*CACHE)
    written = sum(file.stat().st_size for file in (here / "cache").glob("*.safetensors"))
    assert 0.9 * 1000 * float(size) < written <= 1000 * float(size)
    assert "where 28 sequences are already; it is complete" in ran(*CACHE, "--dry-run").stderr


def test_a_dry_run_finds_what_the_run_would_refuse(here: Path) -> None:
    many = ["90" if word == "8" else word for word in CACHE]
    assert "--topk, --rand-neg" in ran(*many, "--rand-neg", "9", "--dry-run", code=2).stderr
    assert "nowhere: no such" in ran(*CACHE, "data.path=nowhere", "--dry-run", code=2).stderr
    assert "--out text.txt" in ran("selftext", "-m", "./toy", "-o", "text.txt", "--dry-run", code=2).stderr


def test_a_text_that_a_model_would_write_is_described(here: Path) -> None:
    result = ran("selftext", "-m", "./toy", "--tokens", "2k", "-o", "own.jsonl", "--dry-run")
    assert "unless outputs/self_text has it, toy first writes 2,000 tokens" in result.stderr
    assert "neither own.jsonl" in result.stderr
    assert {path.name for path in here.iterdir()} == {"toy", "text"}


def test_a_pretraining_is_described(here: Path) -> None:
    result = ran("pretrain", "model=tiny", "training.max_steps=7", "--dry-run")
    assert "max_steps: 7" in result.stdout
    assert "a new Llama of 6,163,712 parameters" in result.stderr
    assert "trains on 28,672 tokens" in result.stderr
    assert {path.name for path in here.iterdir()} == {"toy", "text"}


def test_a_plan_is_one_object() -> None:
    found = json.loads(ran("plan", "-m", "smollm2_135m", "training.max_steps=10", "--gpus", "8", "--json").stdout)
    [stage] = found["stages"]
    assert (found["parameters"], stage["steps"]) == (134_515_008, 10)
    assert stage["peak"] == pytest.approx(sum(stage["memory"].values()))
    assert found["cost"] == pytest.approx([8 * hours * found["price"] for hours in stage["hours"]])
    assert stage["fits"] is (stage["peak"] <= found["gpu"]["memory"])


def test_a_plan_of_an_unknown_model_says_that_it_knows_none() -> None:
    found = json.loads(ran("plan", "-m", "nobody/nothing", "--json").stdout)
    assert (found["stages"], found["cost"], found["parameters"]) == ([], None, None)
