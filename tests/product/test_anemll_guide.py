"""The ANEMLL guide works on a toy model: its workflows, scripts and functions, flag by flag."""

import csv
import json
import operator
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, tokenizer
from torch import Tensor
from toyrun import toy_files
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import qat_lora
from wrinklefree.cli import app
from wrinklefree.config.compose import read_config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.formats import anemll
from wrinklefree.methods.anemll import Config
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model
from wrinklefree.training import checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = ["data=local", "data.path=text", "training.final_eval_tokens=64", "training.eval_tokens=64"]
SMALL = ["--batch-size", "2", "--max-steps", "3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model, its text, and a KD cache of both."""
    folder = tmp_path_factory.mktemp("guide")
    toy_files(folder)
    arguments = ["cache", "-m", str(folder / "toy"), "--out", str(folder / "cache"), "--topk", "8", "--length", "16"]
    sizes = ["--sequences", "24", "--heldout", "4", "data=local", f"data.path={folder / 'text'}"]
    result = CliRunner().invoke(app, [*arguments, *sizes])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("toy", "text", "cache"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return tmp_path


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> int:
    """Run a script as the shell would; its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    try:
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def steps(run: Path) -> list[dict[str, str]]:
    with (run / "training_log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def plain_codes(folder: Path) -> dict[str, Tensor]:
    return {fqn: layer.encode().index for fqn, layer in quant_layers(load_model(folder)[0]).items()}


@pytest.mark.parametrize(
    ("workflow", "last"),
    [
        pytest.param("a", "a_v2", marks=pytest.mark.slow),
        pytest.param("b", "b_v2", marks=pytest.mark.slow),
        ("c", "c_q2"),
    ],
)
def test_a_workflow_is_one_command(folder: Path, workflow: str, last: str) -> None:
    arguments = ["anemll", "-m", "./toy", "--workflow", workflow, "--cache", "cache", *SHORT]
    arguments += ["training.max_steps=2", "training.batch_size=2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    run = folder / "outputs" / f"anemll_toy_{last}"
    assert {"final", "packed", "anemll"} <= {path.name for path in run.iterdir()}
    trained, packed = (load_model(run / name, dtype=torch.float32)[0] for name in ("final", "packed"))
    ids = torch.arange(12).unsqueeze(0)
    assert torch.allclose(trained(ids).logits, packed(ids).logits, atol=5e-3)  # the rest is bf16
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0
    assert "done, in" in again.output


@pytest.mark.slow
def test_frozen_codes_are_those_of_the_first_step(folder: Path) -> None:
    arguments = ["anemll", "-m", "./toy", "--workflow", "a", "--cache", "cache", *SHORT, "training.max_steps=2"]
    assert CliRunner().invoke(app, [*arguments, "training.lr=1e-3"]).exit_code == 0
    before, after = (plain_codes(folder / "outputs" / f"anemll_toy_{name}") for name in ("a_v1", "a_v2"))
    assert all(torch.equal(before[fqn], after[fqn]) for fqn in before)


@pytest.mark.slow
def test_a_setting_may_be_for_one_step(folder: Path) -> None:
    arguments = ["anemll", "-m", "./toy", "--workflow", "a", "--cache", "cache", *SHORT, "v1:training.max_steps=2"]
    assert CliRunner().invoke(app, [*arguments, "v2:training.max_steps=0"]).exit_code == 0
    trained = [
        read_config(folder / "outputs" / f"anemll_toy_a_{step}" / "final" / checkpoint.CONFIG) for step in ("v1", "v2")
    ]
    assert [config.training.max_steps for config in trained] == [2, 0]


def test_a_setting_for_a_step_that_this_workflow_lacks_is_refused(folder: Path) -> None:
    result = CliRunner().invoke(app, ["anemll", "-m", "./toy", "--workflow", "a", "q4:training.max_steps=2"])
    assert result.exit_code == 2
    assert "no step q4; its steps: v1, v2" in result.output
    assert not (folder / "outputs").exists()


@pytest.mark.slow
def test_the_guide_from_end_to_end(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """V1, V2 from it, snap, inference, Q4 to Q2, with the guide's own paths to .pt files."""

    def ok(name: str, *arguments: str) -> str:
        assert script(monkeypatch, name, *arguments) == 0, capsys.readouterr().err
        return str(capsys.readouterr().out)

    toy, cache = ["--model-id", "./toy"], ["--cache-dir", "cache"]
    tiny_sizes = ["--scale-rank", "4", "--attn-scale-rank", "2", "--kd-cache-dir", "cache"]
    ok("train_anemll_qat.py", *toy, *tiny_sizes, "--output-dir", "runs/v1", *SMALL, "--lr", "1e-3", *SHORT)
    log = steps(Path("runs/v1"))
    assert list(log[0])[:5] == ["step", "train_loss", "eval_loss", "lr", "elapsed_sec"]
    frozen = [*toy, *cache, *SMALL, *SHORT, "--lr", "1e-3"]
    ok("train_v2_simple.py", "--v1-checkpoint", "runs/v1/best.pt", "--output-dir", "runs/v2", *frozen)
    v1, v2 = plain_codes(Path("runs/v1/best")), plain_codes(Path("runs/v2"))
    assert all(torch.equal(v1[fqn], v2[fqn]) for fqn in v1)
    ok("snap_and_test_v2.py", *toy, "--checkpoint", "runs/v2/best_state_dict.pt", "--fp16", "--output", "out/snap.pt")
    assert json.loads(Path("out/config.json").read_text())["mlp_lut_bits"] == 2
    said = ok("test_inference.py", "out/snap.pt", *toy, "--version", "v2", "--prompt", "w1 w2", "--max-tokens", "3")
    assert "v2" in said
    sizes = ["--config", "q2a4", "--g-only", "--save-steps", "2"]
    ok("train_v2_simple.py", "--from-scratch", "--output-dir", "runs/scratch", *frozen, *sizes)
    assert (Path("runs/scratch/checkpoints/step_2/state/trainer.pt")).is_file()
    q4 = ["--lut-size", "16", "--scale-rank", "4", "--attn-scale-rank", "4", "--kd-cache-dir", "cache"]
    ok("train_anemll_qat.py", *toy, *q4, "--output-dir", "runs/q4", *SMALL, *SHORT, "--train-scales")
    said = ok(
        "convert_q4_to_q2.py", *toy, "--q4-checkpoint", "runs/q4/best.pt", "--output", "q2/init.pt", "--eval", *cache
    )
    assert "held-out KD loss" in said
    ok("train_v2_simple.py", "--v2-checkpoint", "q2/init.pt", "--output-dir", "runs/q2", *frozen, "--mlp-only")
    ok("convert_v1_to_v2.py", *toy, "--v1-checkpoint", "runs/v1", "--output", "runs/v2_init")
    assert "gradient of A" in ok("debug_layer_qat.py", *toy, "--layer", "1", "--test-grad")
    assert "held-out KD loss" in ok("debug_layer_qat.py", *toy, "--layer", "1", "--test-train", "--cache", "cache")
    ok("plot_loss.py", "runs/v1", "--run_dir", "runs/v2", "--save", "loss.png")
    assert Path("loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_training_goes_on_where_the_run_is_and_keeps_what_was_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The guide's way to continue: from a run's own file into that run's folder."""
    common = ["--model-id", "./toy", "--cache-dir", "cache", *SMALL, *SHORT, "--output-dir", "runs/v2"]
    assert script(monkeypatch, "train_v2_simple.py", "--from-scratch", *common) == 0, capsys.readouterr().err
    before = Path("runs/v2/training_log.csv").read_bytes(), plain_codes(Path("runs/v2"))
    again = ["--v2-checkpoint", "runs/v2/v2_q2a4_fp32_20250101_000000.pt", *common]
    assert script(monkeypatch, "train_v2_simple.py", *again, "training.max_steps=many") == 2
    assert Path("runs/v2/training_log.csv").read_bytes() == before[0]
    for number in (1, 2):
        assert script(monkeypatch, "train_v2_simple.py", *again) == 0, capsys.readouterr().err
        assert len(plain_codes(Path(f"runs/v2/earlier_{number}"))) == 14
    assert Path("runs/v2/earlier_1/training_log.csv").read_bytes() == before[0]
    assert all(torch.equal(codes, before[1][fqn]) for fqn, codes in plain_codes(Path("runs/v2")).items())


@pytest.mark.slow
def test_a_run_may_start_from_a_file_in_its_own_folder_twice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Workflow C: `q2_init.pt` and its config.json lie where the run is going to be."""
    anemll.write(Config(rank=4, attn_rank=2).prepare(llama()), tokenizer(), Path("run"), [])
    start = ["--v2-checkpoint", f"run/{anemll.FILE}", "--output-dir", "run", "--model-id", "./toy", *SMALL, *SHORT]
    assert script(monkeypatch, "train_v2_simple.py", *start, "--cache-dir", "nocache") == 2
    assert script(monkeypatch, "train_v2_simple.py", *start, "--cache-dir", "cache") == 0, capsys.readouterr().err
    assert model_folder(Path("run")) == Path("run/final")
    assert script(monkeypatch, "train_v2_simple.py", *start, "--cache-dir", "nocache") == 2
    assert model_folder(Path("run")) == Path("run/final")  # moved back
    assert not Path("run/earlier_1").exists()
    assert script(monkeypatch, "train_v2_simple.py", *start, "--cache-dir", "cache") == 0, capsys.readouterr().err
    assert len(plain_codes(Path("run/earlier_1"))) == 14


@pytest.mark.slow
def test_the_best_model_lies_where_the_next_lines_of_the_guide_look(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """`cp runs/v2_output/*.pt` and `load_v2_checkpoint("RUN/best_state_dict.pt")`."""
    common = ["--model-id", "./toy", "--cache-dir", "cache", *SMALL, *SHORT, "--output-dir", "runs/v2_output"]
    assert script(monkeypatch, "train_v2_simple.py", "--from-scratch", *common) == 0, capsys.readouterr().err
    assert [path.name for path in Path("runs/v2_output").glob("*.pt")] == ["best_state_dict.pt"]
    capsys.readouterr()
    model = llama()
    qat_lora.replace_linear_with_anemll_v2(model)
    assert qat_lora.load_v2_checkpoint(model, "runs/v2_output/best_state_dict.pt") == 14
    assert "Manually loaded 14 _Q buffers" in capsys.readouterr().out
    trained = load_model(Path("runs/v2_output/best"))[0]
    ids = torch.arange(12).unsqueeze(0)
    assert torch.allclose(model(ids).logits, trained(ids).logits, atol=1e-5)


ONE_STEP = ["--model-id", "./toy", "--max-steps", "1", "--batch-size", "2", "--force", *SHORT]
V2_FLAGS = ["--lr", "1e-3", "--hard-top1", "0.1", "--hard-full", "0.01", "--save-steps", "1", "--wandb-project", "p"]
V2_FLAGS += ["--temperature", "1.5", "--accumulation-steps", "2", "--clip-grad-norm", "0.5", "--weight-decay", "0.1"]
V2_FLAGS += ["--eval-steps", "1", "--warmup-steps", "0", "--min-lr-ratio", "0.2", "--wandb-run", "r", "--attn-only"]
V1_FLAGS = ["--lut-size", "8", "--scale-rank", "3", "--attn-lut-size", "4", "--attn-scale-rank", "2", "--train-weights"]
V1_FLAGS += ["--group-size", "8", "--lr", "1e-4", "--scale-lr", "1e-3", "--temperature", "3", "--logging-steps", "1"]
V1_FLAGS += ["--hard-top1-weight", "0.1", "--hard-full-weight", "0.1", "--eval-steps", "1"]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        (
            "train_v2_simple.py",
            ["--from-scratch", "--cache-dir", "cache", "--config", "q2a2", *V2_FLAGS],
            {
                "training.lr": 1e-3,
                "training.optimizer.scale_lr": 1e-3,
                "training.optimizer.weight_decay": 0.1,
                "training.gradient_accumulation_steps": 2,
                "training.gradient_clipping": 0.5,
                "training.save_interval": 1,
                "training.eval_interval": 1,
                "training.scheduler.min_lr_ratio": 0.2,
                "training.scheduler.warmup_ratio": 0.0,
                "training.logging.wandb.project": "p",
                "training.logging.wandb.name": "r",
                "distillation.hard_top1": 0.1,
                "distillation.hard_full": 0.01,
                "distillation.temperature": 1.5,
                "method.attn_only": True,
                "method.attn_bits": 2,
                "method.attn_rank": 32,
                "method.view": "v2",
            },
        ),
        (
            "train_v2_simple.py",
            ["--from-scratch", "--cache-dir", "cache", "--config", "q4a4", "--ste-fp16", "--mlp-only", "--g-only"],
            {"method.bits": 4, "method.ste_fp16": True, "method.mlp_only": True, "method.g_only": True},
        ),
        (
            "train_anemll_qat.py",
            ["--kd-cache-dir", "cache", *V1_FLAGS],
            {
                "method.bits": 3,
                "method.rank": 3,
                "method.attn_bits": 2,
                "method.attn_rank": 2,
                "method.train": "weights",
                "method.group_size": 8,
                "training.lr": 1e-4,
                "training.optimizer.scale_lr": 1e-3,
                "training.log_interval": 1,
                "distillation.temperature": 3.0,
                "distillation.hard_top1": 0.1,
                "distillation.hard_full": 0.1,
            },
        ),
    ],
)
def test_every_flag_arrives(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    name: str,
    arguments: list[str],
    expected: dict[str, Any],
) -> None:
    assert script(monkeypatch, name, *arguments, "--output-dir", "run", *ONE_STEP) == 0, capsys.readouterr().err
    config = read_config(folder / "run" / "final" / checkpoint.CONFIG)
    for key, value in expected.items():
        assert operator.attrgetter(key)(config) == pytest.approx(value), key


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("test_inference.py", ["nothing.pt", "--model-id", "./toy"], "nothing.pt: no such file"),
        ("snap_and_test_v2.py", ["--checkpoint", "text/00.txt", "--model-id", "./toy"], "not a state dict"),
        ("convert_v1_to_v2.py", ["--v1-checkpoint", "toy", "--output", "x.pt"], "no checkpoint of"),
        ("debug_layer_qat.py", ["--model-id", "./toy", "--layer", "99"], "layers 0 to 13"),
        ("debug_layer_qat.py", ["--model-id", "./toy", "--scale-rank", "0"], "rank: input should be greater than 0"),
        ("train_v2_simple.py", ["--v1-checkpoint", "gone", "--cache-dir", "cache", "--model-id", "./toy"], "gone"),
        ("test_inference.py", ["toy", "--temperature", "-1"], "--temperature"),
        ("snap_and_test_v2.py", ["--checkpoint", "gone.pt", "--output", "text/00.txt"], "--force"),
        ("snap_and_test_v2.py", ["--checkpoint", "gone.pt", "--output", "text/00.txt/x.pt"], "no folder to write to"),
        ("snap_and_test_v2.py", ["--checkpoint", "gone.pt", "--device", "mps"], "this machine has none"),
        ("convert_q4_to_q2.py", ["--q4-checkpoint", "gone.pt", "--output", "toy"], "--force"),
        ("plot_loss.py", ["gone"], "no such file"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str, arguments: list[str], said: str
) -> None:
    assert script(monkeypatch, name, *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert said in error


def test_scripts_show_their_flags_at_once_and_nothing_of_the_libraries(folder: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)

    paths = [str(path) for path in sorted(SCRIPTS.glob("[!_]*.py"))]
    program = f"""
import contextlib, io, runpy, sys
sys.argv = ["x", "--help"]
sys.path.insert(0, {str(SCRIPTS)!r})
for path in {paths}:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, path
    assert "usage" in said.getvalue().lower(), path
    assert "torch" not in sys.modules, path
"""
    assert len(paths) > 5
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    done = run(str(SCRIPTS / "debug_layer_qat.py"), "--model-id", "./toy", "--layer", "1")
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr  # a progress bar


def shell(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["env", *(f"{key}={value}" for key, value in variables.items()), "bash", str(SCRIPTS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_file_is_kept_with_all_that_it_needs(folder: Path) -> None:
    for name in ("m.pt", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        Path(name).write_text("x")
    assert shell("save_to_drive.sh", "m.pt", "kept", DEST="drive").returncode == 0
    with tarfile.open("drive/kept.tgz") as archive:
        assert len(archive.getnames()) == 5


@pytest.mark.skipif(Path("/content/drive/MyDrive").is_dir(), reason="a Drive is mounted")
@pytest.mark.parametrize("place", [{}, {"DEST": "/content/drive/MyDrive/elsewhere"}])
def test_a_drive_that_is_not_mounted_is_said_and_nothing_is_written(folder: Path, place: dict[str, str]) -> None:
    Path("m.pt").write_text("x")
    there = Path("/content").exists()
    done = shell("save_to_drive.sh", "m.pt", "kept", **place)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no Google Drive is mounted" in done.stderr
    assert Path("/content").exists() == there


@pytest.mark.parametrize(
    ("arguments", "said"), [(["gone"], "nothing there"), (["../gone"], "usage"), (["--help"], "usage")]
)
def test_a_cache_that_is_not_there_is_one_line(folder: Path, arguments: list[str], said: str) -> None:
    done = shell("pull_cache.sh", *arguments, SOURCE=f"file://{folder}/drive")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr


def test_the_guides_functions(folder: Path) -> None:
    model, words = AutoModelForCausalLM.from_pretrained("toy", dtype=torch.float32), tokenizer()
    assert qat_lora.replace_linear_with_anemll_v2(model, scale_rank=4, attn_scale_rank=2) == 14
    before = qat_lora.evaluate_kd_loss(model, words, "cache")
    hard = {"hard_top1": 0.0, "hard_full": 0.0}  # this teacher has no opinion to be sure of
    after = qat_lora.train_e2e(model, words, "cache", "run", max_steps=8, lr=3e-4, batch_size=4, **hard)
    assert after < before
    ids = torch.arange(12).unsqueeze(0)
    logits = model.eval()(ids).logits
    assert torch.allclose(load_model("run")[0](ids).logits, logits, atol=1e-5)
    with pytest.raises(UserError, match="already holds a run"):
        qat_lora.train_e2e(model, words, "cache", "run", max_steps=1)
    for switch in (qat_lora.set_factored_inference_v2, qat_lora.set_batched_forward_v2):
        assert switch(model, True) == 14
        assert torch.allclose(model(ids).logits, logits, atol=1e-3)
        switch(model, False)
    assert qat_lora.snap_model_for_ane_v2(model) == 14
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)
    anemll.write_state(model, folder / "m.pt")
    other = AutoModelForCausalLM.from_pretrained("toy", dtype=torch.float32)
    qat_lora.replace_linear_with_anemll_v2(other, scale_rank=4, attn_scale_rank=2)
    assert qat_lora.load_v2_checkpoint(other, folder / "m.pt") == 14
    assert torch.allclose(other.eval()(ids).logits, logits, atol=1e-2)
    assert qat_lora.convert_model_to_fp16_v2(model) is model


def test_freezing_keeps_the_model(folder: Path) -> None:
    model = Config(rank=4, attn_rank=2).prepare(llama()).eval()
    ids = torch.arange(12).unsqueeze(0)
    logits = model(ids).logits
    assert qat_lora.freeze_Q_all(model) == 14
    assert all(layer.config.view == "v2" for layer in quant_layers(model).values())
    assert torch.allclose(model(ids).logits, logits, atol=1e-5)


def test_attention_may_stay() -> None:
    model = llama()
    assert qat_lora.replace_linear_with_anemll_v2(model, scale_rank=2, quantize_attn=False) == 6


def test_rounding_to_half_keeps_the_gradient() -> None:
    x = torch.tensor([1.0001, 7e4], requires_grad=True)
    y = qat_lora.ste_fp16(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([1.0, 65504.0]))
    assert torch.equal(x.grad, torch.ones(2))
