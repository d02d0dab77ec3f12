"""The guides' commands, line by line as it prints them. Cloud commands have their own tests.

`wf` lines run with `--dry-run` and without a network: the config must come out as the guide says.
"""

import runpy
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tiny import ids, llama, tokenizer
from toyrun import overrides, rows, toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.cloud.places import scales
from wrinklefree.core.method import quant_layers

SCRIPTS = Path(__file__).parents[2] / "scripts"

# The line, and what of the resolved config it must set.
LINES: dict[str, dict[str, object]] = {
    "wf fairy2 -m smollm2_135m --mode w2": {
        "method.num_stages": 2,
        "model.pretrained": "HuggingFaceTB/SmolLM2-135M",
        "output_dir": "outputs/fairy2_smollm2_135m_w2",
        "method.exclude_names": ["embed_tokens", "lm_head"],
        "training.scheduler.name": "wsd",
        "training.scheduler.warmup_ratio": 0.05,
        "training.scheduler.decay_ratio": 0.15,
        "training.save_interval": 1000,
        "training.logging.wandb.project": "wrinklefree-fairy2",
    },
    "wf fairy2 -m smollm2_135m --mode w1": {"method.num_stages": 1, "output_dir": "outputs/fairy2_smollm2_135m_w1"},
    "wf fairy2 -m smollm2_135m training.total_tokens=100000000": {
        "training.total_tokens": 100_000_000,
        "method.num_stages": 2,
    },
    "wf fairy2 -m smollm2_135m training.max_steps=10000": {"training.max_steps": 10_000},
    "wf fairy2 -m smollm2_135m training.optimizer.lr=5e-5": {"training.optimizer.lr": 5e-5},
    "wf fairy2 -m smollm2_135m --mode w2 training.max_steps=100": {"training.max_steps": 100},
    "wf fairy2 -m qwen3_4b --mode w2 --scale large": {
        "model.pretrained": "Qwen/Qwen3-4B",
        "training.batch_size": 8,
        "training.gradient_accumulation_steps": 2,
    },
    """wf fairy2 -m smollm2_135m --mode w2 \\
  training.optimizer.lr=1e-4 \\
  training.batch_size=4 \\
  training.total_tokens=1000000000""": {
        "training.optimizer.lr": 1e-4,
        "training.batch_size": 4,
        "training.total_tokens": 1_000_000_000,
    },
    """wf fairy2 -m smollm2_135m \\
  training.resume_from=gs://wrinklefree-checkpoints/fairy2/smollm2_135m/step_5000.pt""": {
        "training.resume_from": "gs://wrinklefree-checkpoints/fairy2/smollm2_135m/step_5000.pt"
    },
    "wf fairy2 -m smollm2_135m --mode w2 --scale small": {"training.gradient_accumulation_steps": 8},
    "wf fairy2 -m smollm2_135m --mode w2 --scale medium": {"training.gradient_accumulation_steps": 4},
    "uv run python scripts/train.py model=smollm2_135m training=fairy2_w2": {
        "method.num_stages": 2,
        "model.name": "smollm2_135m",
    },
    "uv run python scripts/train.py model=qwen3_4b training=fairy2_w1": {"method.num_stages": 1},
    # BitDistill
    "uv run python scripts/train.py model=smollm2_135m training=stage1_subln distributed=single_gpu": {
        "output_dir": "outputs/bitdistill_smollm2_135m_stage1_subln",
        "method.name": "bitdistill",
        "training.max_steps": 0,
    },
    """uv run python scripts/train.py \\
    model=smollm2_135m \\
    training=stage2_pretrain \\
    distributed=single_gpu \\
    training.max_steps=10""": {
        "output_dir": "outputs/bitdistill_smollm2_135m_stage2_pretrain",
        "training.max_steps": 10,
        "training.start_from": ["stage1_9_layerwise", "stage1_subln"],
    },
    "uv run python scripts/train.py model=qwen3_4b training=stage1_subln distributed=single_gpu": {
        "model.pretrained": "Qwen/Qwen3-4B"
    },
    """uv run python scripts/train.py \\
    model=qwen3_4b \\
    training=stage2_pretrain \\
    distributed=fsdp_multi""": {"distributed.strategy": "fsdp"},
    """uv run python scripts/train.py \\
    model=smollm2_135m \\
    training.batch_size=32 \\
    training.lr=1e-4""": {"training.batch_size": 32, "training.lr": 1e-4, "training.optimizer.lr": 1e-4},
    """uv run python scripts/train.py \\
    model=smollm2_135m \\
    model.quantization.weight_bits=1.58""": {"model.quantization.weight_bits": 1.58, "method.name": "bitdistill"},
    "uv run python scripts/train.py model=smollm2_135m training.gradient_accumulation_steps=16": {
        "training.gradient_accumulation_steps": 16
    },
    "uv run python scripts/train.py model=smollm2_135m data=fineweb": {"data.path": "HuggingFaceFW/fineweb"},
    "uv run python scripts/train.py model=smollm2_135m training=stage3_distill data=downstream": {
        "data.source": "downstream",
        "data.task": "sst2",
    },
    "uv run python scripts/train.py model=smollm2_135m training=stage3_distill_smollm2 distillation=classification": {
        "training.max_seq_length": 1024,
        "distillation.attention.weight": 1e5,
        "data.source": "downstream",
    },
    "uv run python scripts/train.py model=llama_7b training=stage1_9_layerwise distributed=fsdp_large": {
        "distributed.cpu_offload": True,
        "distillation.hidden.enabled": True,
    },
}


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache, a working directory of one's own."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


def script(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> int:
    """Run a file of `scripts/` with a command line; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    monkeypatch.syspath_prepend(str(SCRIPTS))  # as Python does for a script
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return int(stopped.value.code or 0)


def lookup(values: dict[str, object], path: str) -> object:
    value: object = values
    for key in path.split("."):
        assert isinstance(value, dict)
        value = value[key]
    return value


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_guide_sets_what_it_says(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*shlex.split(line.replace("\\\n", " ")), "--dry-run"]
    if words[0] == "wf":
        result = CliRunner().invoke(app, words[1:])
        code, out = result.exit_code, result.stdout
    else:
        code = script(monkeypatch, "train.py", *words[words.index("scripts/train.py") + 1 :])
        out = capsys.readouterr().out
    assert code == 0
    values = yaml.safe_load(out)
    for path, expected in LINES[line].items():
        found = lookup(values, path)
        assert (float(found) if isinstance(expected, float) else found) == expected
    assert list(tmp_path.iterdir()) == []


def test_the_smoke_test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """`python scripts/smoke_test.py --model smollm2_135m --mode w2 --steps 10`, with a folder for the model."""
    llama(max_position_embeddings=128).save_pretrained(tmp_path / "toy")
    tokenizer().save_pretrained(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "smoke_test.py", "--model", str(tmp_path / "toy"), "--mode", "w2", "--steps", "10") == 0
    assert capsys.readouterr().out.endswith("ALL TESTS PASSED!\n")
    assert len(rows(tmp_path / "outputs" / "smoke_test_toy_w2")) == 10


def test_the_smoke_test_fails_loudly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert script(monkeypatch, "smoke_test.py", "--model", "./nowhere", "--steps", "1") == 1
    assert "ALL TESTS PASSED!" not in capsys.readouterr().out


def test_the_training_script_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python scripts/train.py model=... training=fairy2_w2`."""
    toy_files(tmp_path)
    assert script(monkeypatch, "train.py", *overrides(tmp_path, "training.max_steps=2")) == 0
    assert (tmp_path / "run" / "packed" / "model.safetensors").is_file()


# The guide's Python.
SNIPPETS: dict[str, Callable[[torch.nn.Module], bool]] = {
    "model = convert_to_fairy2(model, num_stages=2)": lambda m: len(quant_layers(m)) == 14,
    "model = convert_to_fairy2(model, num_stages=1)": lambda m: (
        {layer.config.num_stages for layer in quant_layers(m).values()} == {1}
    ),
    """model = convert_to_fairy2(
    model,
    num_stages=2,
    exclude_names=["embed_tokens", "lm_head", "my_special_layer"]
)""": lambda m: type(m.my_special_layer) is torch.nn.Linear and len(quant_layers(m)) == 14,
}


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_guides_python_runs(snippet: str) -> None:
    model = llama()
    if "my_special_layer" in snippet:
        model.my_special_layer = torch.nn.Linear(8, 8)
    names: dict[str, object] = {"model": model}
    exec(f"from fairy2.models import convert_to_fairy2\n{snippet}", names)
    converted = names["model"]
    assert isinstance(converted, torch.nn.Module)
    assert SNIPPETS[snippet](converted)
    assert converted(ids()).logits.isfinite().all()


def test_a_scale_of_the_guide_is_64_sequences() -> None:
    sizes = {name: s.gpus * s.batch_size * s.accumulation for name, s in scales().items() if name != "dev"}
    assert sizes == dict.fromkeys(("small", "medium", "large", "xlarge"), 64)
