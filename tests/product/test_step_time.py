"""The benchmark of step times: every method and share has its figure, and the key is the worst ratio."""

import json
from pathlib import Path

import pytest
import torch

import wrinklefree.models
from benchmarks import step_time

TINY = Path(wrinklefree.models.__file__).parent / "builtin" / "tiny"


def test_the_benchmark_measures_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    small = ["--micro-batches", "1", "--batch", "1", "--length", "16", "--rounds", "1"]
    step_time.main(["--model", str(TINY), "--json", *small])
    figures = json.loads(capsys.readouterr().out)
    assert figures["methods"].keys() == step_time.METHODS.keys()
    assert figures["step_time_ratio_135m"] == max(row["ratio"] for row in figures["methods"].values())
    for row in figures["methods"].values():
        assert row["shares"].keys() == {"quantizer", "way back", "vocabulary", "optimizer", "body"}
        assert sum(row["shares"].values()) == pytest.approx(row["quantized"])
        assert all(row["shares"][part] > 0 for part in ("quantizer", "way back", "vocabulary", "optimizer"))
    assert torch.get_num_threads() == threads


def test_the_table_has_a_line_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--micro-batches", "1", "--batch", "1", "--length", "16", "--rounds", "1", "--methods", "w1"]
    step_time.main(["--model", str(TINY), *small])
    head, line = capsys.readouterr().out.splitlines()
    assert "16 tokens a step" in head
    assert line.startswith("w1")
