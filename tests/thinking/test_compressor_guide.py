"""The guide's lines for phase 1 set what they say."""

import shlex
from pathlib import Path

import pytest
from phase1 import SCRIPT, script

pytestmark = pytest.mark.numeric

GUIDE = {
    "python -m src.train.phase1_compressor --stage 1a": {"thinking.d_compressed": 256, "training.max_steps": 0},
    "python -m src.train.phase1_compressor --stage 1a --d_compressed 512": {"thinking.d_compressed": 512},
    "python -m src.train.phase1_compressor --stage 1b": {
        "training.start_from": ["checkpoints/phase1/stage1a_final"],
        "data.split": "OpenThoughts3_1.2M_think",
    },
    "accelerate launch -m src.train.phase1_compressor --stage 1a --d_compressed 256": {"thinking.d_compressed": 256},
    "accelerate launch --num_processes 4 -m src.train.phase1_compressor --stage 1a": {"data.source": "hub"},
    "python -m src.train.phase1_compressor --sweep": {"output_dir": "checkpoints/phase1"},
    "python -m src.train.phase1_compressor --sweep --sweep_d_values 128 256 384 512": {},
    "accelerate launch -m src.train.phase1_compressor --sweep": {},
    # every flag of its tables, by itself
    "python -m src.train.phase1_compressor --model_name tiny": {
        "model.pretrained": "builtin:tiny",
        "training.max_seq_length": 256,
    },
    "python -m src.train.phase1_compressor --batch_size 16": {"training.batch_size": 16},
    "python -m src.train.phase1_compressor --num_epochs 2": {
        "training.max_steps": 2 * 50000 // 32,
        "training.keep_best": True,
    },
    "python -m src.train.phase1_compressor --init orthogonal": {
        "training.max_steps": 10 * 50000 // 32,
        "training.optimizer.lr": 1e-3,
        "training.optimizer.weight_decay": 0.01,
        "training.scheduler.name": "cosine",
        "training.gradient_clipping": 1.0,
        "training.keep_best": False,
        "thinking.moment_tokens": 1_000_000,
    },
    "python -m src.train.phase1_compressor --objective kl": {"training.max_steps": 10 * 50000 // 32},
    "python -m src.train.phase1_compressor --learning_rate 5e-4": {"training.optimizer.lr": 5e-4},
    "python -m src.train.phase1_compressor --num_samples 2000": {"thinking.moment_tokens": 2000 * 512},
    "python -m src.train.phase1_compressor --max_seq_length 128": {"training.max_seq_length": 128},
    "python -m src.train.phase1_compressor --output_dir ./elsewhere": {"output_dir": "elsewhere/stage1a"},
    "python -m src.train.phase1_compressor --seed 7": {"seed": 7},
    "python -m src.train.phase1_compressor --use_wandb": {"training.logging.wandb.enabled": True},
    "python -m src.train.phase1_compressor --no_wandb": {"training.logging.wandb.enabled": False},
    "python -m src.train.phase1_compressor --wandb_project mine": {"training.logging.wandb.project": "mine"},
    "python -m src.train.phase1_compressor --wandb_run_name it": {"training.logging.wandb.name": "it"},
    "python -m src.train.phase1_compressor": {
        "training.batch_size": 8,
        "seed": 42,
        "training.max_seq_length": 512,
        "training.logging.wandb.project": "llm-trm-phase1",
        "training.logging.wandb.name": "d256_bs8_lr0.001_1a",
        "model.pretrained": "HuggingFaceTB/SmolLM3-3B",
        "data.path": "HuggingFaceFW/fineweb-edu",
    },
    "python -m src.train.phase1_compressor --sweep --sweep_d_values 8 16 data=stdlib": {"data.source": "stdlib"},
}


@pytest.mark.parametrize("line", GUIDE)
def test_a_line_of_the_guide_sets_what_it_says(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    words = shlex.split(line)
    assert script(*words[words.index("src.train.phase1_compressor") + 1 :], "--dry-run") == 0
    settings, _, told = capsys.readouterr().out.partition("\nestimate for ")
    values = yaml.safe_load(settings)
    assert "\ncost: $" in told
    for path, expected in GUIDE[line].items():
        found = values
        for key in path.split("."):
            found = found[key]
        assert found == expected
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_off_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line that says so; asked for, it is an error."""
    monkeypatch.chdir(tmp_path)
    find = SCRIPT["importlib"].util.find_spec
    monkeypatch.setattr(SCRIPT["importlib"].util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert script("--dry-run") == 0
    out, err = capsys.readouterr()
    assert "wandb:\n      enabled: false" in out
    assert "W&B is off" in err
    assert script("--use_wandb", "--model_name", "tiny") == 2
    assert "pip install 'wrinklefree[wandb]'" in capsys.readouterr().err


def test_the_sizes_of_a_sweep_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("--sweep", "--sweep_d_values", "many")
    assert "numbers, not many" in capsys.readouterr().err
