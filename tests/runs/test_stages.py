"""BitDistill's stages: each by itself, as a chain, and what is said where one is missing."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import ids
from toyrun import toy_files
from transformers import AutoModelForCausalLM, BitNetForCausalLM
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.compose import load_config, read_config
from wrinklefree.core import replaced
from wrinklefree.core.method import quant_layers
from wrinklefree.models.load import load_model
from wrinklefree.runs.folder import outputs
from wrinklefree.training import checkpoint, loop

SHORT = ["training.batch_size=2", "training.gradient_accumulation_steps=1", "training.max_seq_length=32"]
SHORT += ["training.precision=fp32", "training.final_eval_tokens=64", "training.eval_tokens=64", "training.lr=1e-3"]
STEPS = ["training.max_steps=2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy model, text, and rows of sst2, where the test stands."""
    toy_files(tmp_path)
    rows = [{"sentence": f"w{n} w{n + 1} w{n + 2}", "label": n % 2} for n in range(60)]
    (tmp_path / "sst2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wf(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(args))
    return result.exit_code, result.stdout + result.stderr


def train(stage: str, *settings: str) -> tuple[int, str]:
    data = ["task=sst2", "data.path=sst2.jsonl"] if stage in ("stage0_sft", "stage3_distill") else TEXT
    return wf("train", "model=./toy", f"training={stage}", *SHORT, *data, *settings)


TEXT = ["data=local", "data.path=text"]
CHAIN = ["bitdistill", "-m", "./toy", "--task", "sst2", *TEXT, "0:data.path=sst2.jsonl", "3:data.path=sst2.jsonl"]


def run(stage: str) -> Path:
    return Path("outputs") / f"bitdistill_toy_{stage}"


def test_the_chain_runs_skips_what_is_done_and_refuses_other_settings(folder: Path) -> None:
    code, said = wf(*CHAIN, *SHORT, *STEPS, "--stages", "0,1,1.9,2,3")
    assert code == 0, said
    for stage in ("stage0_sft", "stage1_subln", "stage1_9_layerwise", "stage2_pretrain", "stage3_distill"):
        assert (run(stage) / "final" / "model.safetensors").is_file()
        assert re.search(rf"^{stage} ", said, re.MULTILINE)
    started = {
        stage: read_config(run(stage) / "final" / checkpoint.CONFIG) for stage in ("stage2_pretrain", "stage3_distill")
    }
    assert started["stage2_pretrain"].training.start_from == ["stage1_9_layerwise"]
    assert started["stage3_distill"].training.start_from == ["stage2_pretrain"]
    assert started["stage3_distill"].distillation.teacher == "stage0_sft"

    before = {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*.safetensors")}
    advised = ["data.max_passes=300", "data.allow_changes=true"]  # what an error of a later stage may ask for
    code, said = wf(*CHAIN, *SHORT, *STEPS, *advised, "--stages", "0,1,1.9,2,3")
    assert code == 0, said
    assert said.count(": done, in ") == 5
    assert {path: path.stat().st_mtime_ns for path in Path("outputs").rglob("*.safetensors")} == before

    code, said = wf(*CHAIN, *SHORT, *STEPS, "--stages", "0,1,1.9,2,3", "3:training.lr=1e-4")
    assert code == 2
    assert said.splitlines()[-1].startswith("error: outputs/bitdistill_toy_stage3_distill: made with training.")
    assert "--force" in said.splitlines()[-1]


class KilledError(BaseException):
    """What stands for a kill."""


def kill(*args: object, **more: object) -> None:
    raise KilledError


@pytest.mark.parametrize(
    ("moment", "chain"),
    [
        ("results.json", "bitdistill"),
        pytest.param("the first checkpoint", "bitdistill", marks=pytest.mark.slow),
        pytest.param("results.json", "auto_prereq", marks=pytest.mark.slow),
        pytest.param("the first checkpoint", "auto_prereq", marks=pytest.mark.slow),
    ],
)
def test_a_killed_chain_goes_on_with_the_same_command(
    folder: Path, moment: str, chain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chain == "bitdistill":
        command = [*CHAIN, *SHORT, *STEPS, "--stages", "1,2"]
    else:
        command = ["train", "model=./toy", "training=stage2_pretrain", "auto_prereq=true", *SHORT, *TEXT, *STEPS]
    assert wf(*CHAIN, *SHORT, *STEPS, "--stages", "1,2", "--force")[0] == 0
    shutil.rmtree(run("stage2_pretrain"))
    (run("stage1_subln") / "results.json").unlink()
    if moment == "the first checkpoint":
        shutil.rmtree(run("stage1_subln") / "final")
    if chain == "bitdistill":
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_save", kill)
            with pytest.raises(KilledError):
                wf(*command)
    code, said = wf(*command)
    assert code == 0, said
    assert all((run(stage) / "results.json").is_file() for stage in ("stage1_subln", "stage2_pretrain"))


@pytest.mark.slow
def test_a_killed_force_leaves_a_finished_stage_done(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*CHAIN, *SHORT, *STEPS, "--stages", "1"]
    assert wf(*command)[0] == 0
    replaced.set_aside(run("stage1_subln"), outputs(run("stage1_subln")))
    code, said = wf(*command)
    assert (code, said.count(": done, in ")) == (0, 1), said


def test_an_unknown_stage_is_one_line(folder: Path) -> None:
    assert wf(*CHAIN, "--stages", "1,4") == (2, "error: --stages 1,4: no stage '4'; there are 0, 1, 1.9, 2, 3\n")


def test_stage_1_inserts_and_without_rebuilding_changes_no_master(folder: Path) -> None:
    code, said = train("stage1_subln", "training.start=plain", "training.blockwise.enabled=false")
    assert code == 0, said
    model, _ = load_model(run("stage1_subln"))
    assert isinstance(model, BitNetForCausalLM)
    assert len(quant_layers(model)) == 14
    original, _ = load_model(Path("toy"))
    masters, pretrained = model.state_dict(), original.state_dict()
    assert all(torch.equal(masters[name], pretrained[name]) for name in pretrained)
    assert model.model.layers[0].mlp.ffn_sub_norm.weight.unique().numel() > 1  # calibrated


def test_every_stage_leaves_a_folder_that_plain_transformers_opens(folder: Path) -> None:
    for stage, settings in (("stage1_subln", []), ("stage2_pretrain", STEPS)):
        assert train(stage, *settings, "method.scale_mode=absmean")[0] == 0
        ours = load_model(run(stage))[0]
        native, info = AutoModelForCausalLM.from_pretrained(
            run(stage) / "final", dtype=torch.float32, output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            difference = (native(ids()).logits - ours(ids()).logits).abs().max() / ours(ids()).logits.abs().max()
        assert difference < 0.02


def test_a_missing_stage_is_one_line_with_the_command_that_makes_it(folder: Path) -> None:
    code, said = train("stage2_pretrain", *STEPS)
    assert code == 2
    assert said.splitlines()[-1] == (
        "error: stage2_pretrain needs stage1_subln, but there is no outputs/bitdistill_toy_stage1_subln/final: "
        "run `wf train model=./toy training=stage1_subln data=local data.path=text "
        "training.max_seq_length=32 training.precision=fp32`, "
        "or add auto_prereq=true"
    )
    assert not run("stage2_pretrain").exists()


def test_without_a_fine_tuned_teacher_the_original_teaches_and_that_is_said(folder: Path) -> None:
    code, said = train("stage3_distill", *STEPS, "training.start_from=[]")
    assert code == 0, said
    assert "no stage0_sft: the teacher is the original model" in said
    assert "To fine-tune one first: wf train model=./toy training=stage0_sft task=sst2 data.path=sst2.jsonl" in said


def test_an_earlier_stage_is_shared_among_the_same_processes(folder: Path) -> None:
    code, said = train("stage2_pretrain", *STEPS, "distributed=fsdp_multi")
    assert code == 2
    assert "training=stage1_subln distributed=fsdp_multi data=local data.path=text training.max_seq_length=32" in said


@pytest.mark.slow
def test_auto_prereq_runs_what_is_missing(folder: Path) -> None:
    (folder / "local.yaml").write_text("output_root: here\n")
    code, said = train("stage2_pretrain", *STEPS, "auto_prereq=true")
    assert code == 0, said
    assert (folder / "here" / "bitdistill_toy_stage1_subln" / "final" / "config.json").is_file()
    assert (folder / "here" / "bitdistill_toy_stage2_pretrain" / "final" / "config.json").is_file()


def test_an_interrupted_stage_goes_on(folder: Path) -> None:
    settings = [*CHAIN, *SHORT, "--stages", "1,2", "2:training.save_interval=2", "2:training.max_steps=4"]
    code, said = wf(*settings)
    assert code == 0, said
    whole = load_model(run("stage2_pretrain"))[0].state_dict()
    final = run("stage2_pretrain") / "final"
    final.rename(folder / "aside")
    (run("stage2_pretrain") / "checkpoints" / "step_4").rename(folder / "step_4")
    code, said = wf(*settings)
    assert code == 0, said
    assert "resuming from" in said
    again = load_model(run("stage2_pretrain"))[0].state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.items())


def test_weight_bits_are_checked_and_activation_bits_read(folder: Path) -> None:
    code, said = wf("config", "training=stage1_subln", "model.quantization.weight_bits=4")
    assert code == 2
    assert said == "error: model.quantization.weight_bits=4: bitdistill has 1.58\n"
    config = load_config(["training=stage1_subln", "model.quantization.weight_bits=1.58"])
    assert config.method.activation_bits == 8
    assert (
        load_config(["training=stage1_subln", "model.quantization.activation_bits=none"]).method.activation_bits is None
    )
    assert load_config(["training=fairy2_w1", "model.quantization.weight_bits=1"]).method.num_stages == 1


def test_local_yaml_gives_way_to_the_command_line(folder: Path) -> None:
    (folder / "local.yaml").write_text("model: smollm2_135m\ntraining:\n  batch_size: 3\n  lr: 1e-5\n")
    config = load_config(["training=stage1_subln", "training.batch_size=5"])
    assert (config.model.name, config.training.batch_size, config.training.lr) == ("smollm2_135m", 5, 1e-5)
