"""The guide's script writes a KD cache with every flag that the guide names."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conversing import ALPACA, chatty
from tiny import llama

from wrinklefree.data.kd_cache.read import KDCache


def script(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["precompute_teacher_topk.py", *args])
    scripts = Path(__file__).parents[2] / "scripts"
    monkeypatch.syspath_prepend(str(scripts))  # as Python does for a script
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(scripts / "precompute_teacher_topk.py"), run_name="__main__")
    return int(stopped.value.code or 0)


def test_the_guides_script_with_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's line, with a local model and file in place of the hub's, and fewer sequences."""
    llama(vocab_size=300).save_pretrained(tmp_path / "toy")
    chatty().save_pretrained(tmp_path / "toy")
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA | {"output": f"{i}"} for i in range(400)]))
    out = tmp_path / "caches" / "alpaca_chat_think_both_L64_K64_R128"
    line = f"""--teacher_model_name_or_path {tmp_path / "toy"} --dataset_name {tmp_path / "alpaca.json"}
        --dataset_split train --dataset_format alpaca_chat --enable_thinking both --max_length 64 --topk 64
        --rand_neg 128 --num_sequences 40 --batch_size 32 --device cpu --output_dir {out}"""
    assert script(monkeypatch, *line.split()) == 0
    found = KDCache(out).manifest
    assert (found.length, found.topk, found.negatives, found.count("train")) == (64, 64, 128, 40)
    assert found.count("heldout") == 2
    assert found.data["format"] == "alpaca_chat"
    assert found.data["enable_thinking"] == "both"
    assert script(monkeypatch, *line.split(), "--resume") == 0


def test_flags_that_mean_nothing_here_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    given = ["--dataset_name", "stdlib", "--output_dir", str(tmp_path / "x")]
    assert script(monkeypatch, *given, "--wandb_project", "p") == 2
    assert "leave it out" in capsys.readouterr().err
    assert script(monkeypatch, *given, "--resume", "--overwrite") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    capsys.readouterr()
    assert script(monkeypatch, *given, "--device", "cuda") == 2
    assert capsys.readouterr().err == "error: --device cuda: no GPU here; leave it out, or give --device cpu\n"


def test_every_flag_of_the_guide_is_there(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert script(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    flags = """teacher_model_name_or_path dataset_name dataset_config_name dataset_split cache_dir hf_token
        local_files_only resume_download dataset_format dataset_text_field streaming shuffle_buffer enable_thinking
        max_length topk rand_neg num_sequences batch_size shard_size device dtype output_dir resume overwrite seed
        wandb_project wandb_run_name wandb_entity"""
    assert [flag for flag in flags.split() if f"--{flag}" not in text] == []
