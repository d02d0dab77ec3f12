"""Several processes are one: equal losses, exact resumes from any number to any other, stops and failures together.

One torchrun with two CPU processes does all the runs (`processes.py`); the tests look at what they left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toyrun import overrides, resolved, rows, run, tensors, toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.core.signals import STOPPING
from wrinklefree.distributed import sharding
from wrinklefree.distributed.world import ALONE
from wrinklefree.models.load import load_model
from wrinklefree.runs import launch
from wrinklefree.training import checkpoint, saved_state

# Sequences of an odd length have unlike numbers of labels, so that a mean of means would show.
ODD = ["training.max_seq_length=11"]
LEARNED = ["training=stage1_subln", "training.max_steps=4", "method.scale_mode=learned", "method.norm_mode=per_linear"]
SHARDED = [*ODD, "distributed=fsdp_multi"]

# Runs of two processes with 2 sequences each, whose losses are those of one process with 4.
SAME = {
    "replicated": [*ODD, "distributed=single_gpu"],
    "fsdp": [*SHARDED, "training.save_interval=3"],
    "large": [*ODD, "distributed=fsdp_large"],
    "kept": [*SHARDED, "distributed.reshard_after_forward=false", "training.gradient_checkpointing=false"],
    "accumulated": [*SHARDED, "training.gradient_accumulation_steps=2", "training.max_steps=3"],
    "learned": [*SHARDED, *LEARNED],
    "frozen": [*SHARDED, "training.freeze_names=[embed_tokens,layers.0]", "distillation=none"],
    "best": [*SHARDED, "training.keep_best=true"],
    "twice": [*SHARDED, "training.max_steps=3"],
}
# Of weights: a tenth of a step. Adam divides a gradient by its size, so one that is all rounding moves its weight too.
NEAR = 1e-4
ACTS = {"twice": "twice", "stopped": "interrupt", "overflowed": "overflow", "full": "fill", "unreadable": "unreadable"}


def other_jobs(folder: Path) -> dict[str, list[str]]:
    return {
        "resumed": [*SHARDED, f"training.resume_from={folder / 'fsdp' / 'checkpoints' / 'step_3'}"],
        "from_one": [*SHARDED, f"training.resume_from={folder / 'one_fsdp' / 'checkpoints' / 'step_3'}"],
        "other_groups": [*SHARDED, "training.freeze_names=[layers.0]", f"training.resume_from={folder / 'fsdp'}"],
        "bf16": [*SHARDED, "training.precision=bf16", "distillation=none"],
        "relations": [*SHARDED, "distillation=layerwise", "distillation.attention.weight=1"],
        "muon": [*SHARDED, "training.optimizer.name=muon"],
        "compiled": [*SHARDED, "training.compile=true"],
        "stopped": SHARDED,
        "unreadable": SHARDED,
        "overflowed": SHARDED,
        "full": [*SHARDED, "training.save_interval=3"],  # the last: its limit stays
    }


def start(folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [str(Path(__file__).parents[1] / "processes.py"), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, *program], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr


def alone(folder: Path, name: str, *more: str) -> None:
    """The same run in one process."""
    from processes import twice

    settings = ["training.batch_size=4", *more, "distributed=single_gpu", f"output_dir={folder / f'one_{name}'}"]
    run(resolved(folder, *settings), objective=twice if name == "twice" else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs have been: two processes under their names, one process under `one_NAME`."""
    folder = tmp_path_factory.mktemp("runs")
    toy_files(folder)
    for name in ("fsdp", "accumulated", "learned", "frozen", "best", "twice"):
        alone(folder, name, *SAME[name])
    halves = ["training.batch_size=2", "training.gradient_accumulation_steps=2"]
    for name in ("relations", "bf16"):
        alone(folder, name, *other_jobs(folder)[name], *halves)
    jobs = SAME | other_jobs(folder)
    spelled = [{"name": name, "settings": settings, "act": ACTS.get(name)} for name, settings in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(spelled))
    start(folder)
    return folder


def result(folder: Path, name: str, rank: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def twin(folder: Path, name: str) -> Path:
    """The run of one process to compare with."""
    alone_too = folder / f"one_{name}"
    return alone_too if alone_too.exists() else folder / "one_fsdp"


def assert_same_log(run: Path, other: Path, relative: float) -> None:
    logged, expected = rows(run), rows(other)
    assert [row["step"] for row in logged] == [row["step"] for row in expected]
    for mine, one in zip(logged, expected, strict=True):
        assert mine["tokens"] == one["tokens"]
        for column in ("train_loss", "train_ce", "grad_norm", "eval_loss"):
            if one[column]:
                assert float(mine[column]) == pytest.approx(float(one[column]), rel=relative), column


@pytest.mark.parametrize("name", SAME)
def test_two_processes_give_the_losses_of_one(folder: Path, name: str) -> None:
    """And its gradient norms and weights, tied embeddings and trained scales among them."""
    assert result(folder, name)["error"] is None
    assert_same_log(folder / name, twin(folder, name), 1e-4)
    mine, one = weights(folder / name), weights(twin(folder, name))
    assert mine.keys() == one.keys()
    for key, tensor in one.items():
        assert torch.allclose(mine[key], tensor, atol=NEAR), key


@pytest.mark.parametrize(("name", "relative"), [("bf16", 2e-3), ("relations", 1e-4)])
def test_two_processes_are_two_micro_batches(folder: Path, name: str, relative: float) -> None:
    """Relations and hidden states are means over more tokens than have labels; bf16 rounds by the matrix's shape."""
    assert_same_log(folder / name, folder / f"one_{name}", relative)


def test_muon_learns_sharded(folder: Path) -> None:
    """Its orthogonalization is in bf16, which rounds otherwise over shares: no 1e-4 there."""
    assert result(folder, "muon")["error"] is None
    assert float(rows(folder / "muon")[-1]["train_loss"]) < 0.1


@pytest.mark.parametrize("name", ["fsdp", "large", "learned"])
def test_each_process_holds_its_share_alone(folder: Path, name: str) -> None:
    """Of parameters; and no effective weight outlives its forward."""
    shares = [result(folder, name, rank) for rank in (0, 1)]
    assert all(share["sharded"] for share in shares)
    assert sum(share["here"] for share in shares) == shares[0]["whole"]
    assert all(0.4 < share["here"] / share["whole"] < 0.6 for share in shares)
    assert [share["kept"] for share in shares] == [0, 0]
    replicated = result(folder, "replicated", 1)
    assert replicated["here"] == replicated["whole"]
    assert not replicated["sharded"]
    assert replicated["kept"] > 0


def test_large_offloads_to_the_cpu_and_gathers_ahead(folder: Path) -> None:
    large, multi = result(folder, "large"), result(folder, "fsdp")
    assert [large[f"offload {n}"] for n in (0, 1)] == ["CPUOffloadPolicy"] * 2
    assert [multi[f"offload {n}"] for n in (0, 1)] == ["OffloadPolicy"] * 2
    assert (large["ahead 0"], large["behind 1"]) == (1, 1)  # of two layers there is one to look ahead to
    assert not any(value for key, value in multi.items() if key.startswith(("ahead", "behind")))


def test_a_sharded_checkpoint_is_a_hugging_face_folder_with_shards_without_pickles(folder: Path) -> None:
    path = folder / "fsdp" / "checkpoints" / "step_3"
    model, _ = load_model(path)
    assert quant_layers(model)
    one, _ = load_model(folder / "one_fsdp" / "checkpoints" / "step_3")
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "wrinklefree.yaml", "state/trainer.pt"} <= names
    assert len([name for name in names if name.startswith("state/shards/")]) == 2
    assert not [name for name in names if not name.endswith((".safetensors", ".json", ".yaml", "trainer.pt"))]
    assert all(torch.allclose(value, one.state_dict()[name], atol=NEAR) for name, value in model.state_dict().items())
    state = saved_state.load_state(path)  # with weights_only
    assert len(state["shards"]) == 2 * len(list(model.parameters()))
    assert all(tensor.ndim == 0 for _, tensor in tensors(state["optimizers"]))


def test_resuming_two_processes_gives_the_bits_of_an_unbroken_run(folder: Path) -> None:
    assert rows(folder / "resumed") == rows(folder / "fsdp")[3:]
    whole, resumed = weights(folder / "fsdp"), weights(folder / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_checkpoint_of_two_processes_resumes_on_one(folder: Path) -> None:
    middle = f"training.resume_from={folder / 'fsdp' / 'checkpoints' / 'step_3'}"
    run(resolved(folder, "training.batch_size=4", *ODD, middle, f"output_dir={folder / 'alone'}"))
    for mine, expected in zip(rows(folder / "alone"), rows(folder / "fsdp")[3:], strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-4)
    expected_weights = weights(folder / "fsdp")
    assert all(
        torch.allclose(tensor, expected_weights[n], atol=NEAR) for n, tensor in weights(folder / "alone").items()
    )
    state = saved_state.load_state(folder / "alone" / "checkpoints" / "step_6")
    assert state["shards"] == []


def test_a_checkpoint_of_one_process_resumes_on_two(folder: Path) -> None:
    assert result(folder, "from_one")["error"] is None
    for mine, one in zip(rows(folder / "from_one"), rows(folder / "one_fsdp")[3:], strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=1e-4)


def test_resuming_with_other_parameters_is_refused_by_all(folder: Path) -> None:
    for rank in (0, 1):
        assert "other training.optimizer or freeze_names" in result(folder, "other_groups", rank)["error"]


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_broken_shards_are_one_line(folder: Path, tmp_path: Path, damage: str) -> None:
    source, broken = folder / "fsdp" / "checkpoints" / "step_3", tmp_path / "step_3"
    subprocess.run(["cp", "-r", source, broken], check=True)
    shard = sorted((broken / saved_state.SHARDS).iterdir())[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"shards.*missing, truncated") as refused:
        run(resolved(folder, "training.batch_size=4", *ODD, f"training.resume_from={broken}", f"output_dir={tmp_path}"))
    assert "\n" not in str(refused.value)


def test_ctrl_c_on_one_process_stops_and_saves_all(folder: Path) -> None:
    for rank in (0, 1):
        assert "stopped at step 3, saved" in result(folder, "stopped", rank)["error"]
    assert [path.name for path in checkpoint.step_folders(folder / "stopped" / "checkpoints")] == ["step_3"]


def test_data_that_one_process_cannot_read_stops_and_saves_all(folder: Path) -> None:
    for rank in (0, 1):
        error = result(folder, "unreadable", rank)["error"]
        assert error.startswith("rows.jsonl, line 7: not JSON; stopped at step 2, saved")
    assert [path.name for path in checkpoint.step_folders(folder / "unreadable" / "checkpoints")] == ["step_2"]


def test_what_overflows_on_one_process_is_named_by_all(folder: Path) -> None:
    for rank in (0, 1):
        error = result(folder, "overflowed", rank)["error"]
        assert "step 3: loss is nan" in error or "step 3: loss is inf" in error
        assert "layer model.layers.1.mlp.down_proj" in error


def test_a_full_disk_under_one_process_is_said_by_all_and_leaves_nothing(folder: Path) -> None:
    for rank in (0, 1):
        assert "disk full while writing" in result(folder, "full", rank)["error"]
    assert list((folder / "full" / "checkpoints").iterdir()) == []


def test_compiling_sharded_layers_is_refused(folder: Path) -> None:
    assert "training.compile=true: does not work with fsdp" in result(folder, "compiled", 1)["error"]


@pytest.mark.parametrize("setting", ["cpu_offload=true", "prefetch=1", "reshard_after_forward=false"])
def test_settings_of_fsdp_without_it_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match="no effect without fsdp"):
        sharding.choose_placement(load_config([f"distributed.{setting}"]).distributed, False, ALONE)


def test_one_process_shards_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "wrinklefree"):
        placement = sharding.choose_placement(load_config(["distributed=fsdp_large"]).distributed, False, ALONE)
    assert type(placement) is sharding.Whole
    assert "nothing to shard" in caplog.text


def test_processes_are_counted_by_gpus_and_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    whole, sharded = (load_config([f"distributed={name}"]) for name in ("single_gpu", "fsdp_multi"))
    counts = {}
    for gpus in (0, 4):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        counts[gpus] = [launch.count_processes(c, asked) for c in (whole, sharded) for asked in (None, 1, 2)]
    assert counts == {0: [1, 1, 2, 1, 1, 2], 4: [1, 1, 2, 4, 1, 2]}
    with pytest.raises(UserError, match="--nproc 5: each process needs a GPU of its own, this machine has 4"):
        launch.count_processes(whole, 5)
    monkeypatch.setenv("RANK", "1")
    assert launch.count_processes(sharded, None) == 1


def started(folder: Path) -> "subprocess.Popen[str]":
    """A long run of two processes that has taken some steps."""
    toy_files(folder)
    settings = ["training.max_steps=100000", "distributed=fsdp_multi"]
    command = [sys.executable, "-m", "wrinklefree.cli", "train", *overrides(folder, *settings), "--nproc", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    log = folder / "run" / "training_log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.2)
    return process


def ranks_of(folder: Path) -> list[int]:
    """The processes that train in `folder`, without `wf` and torchrun."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            ranked = b"RANK=" in (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if ranked and f"output_dir={folder / 'run'}".encode() in words:
            found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_to_wf_saves_in_all_processes_and_ends_them(tmp_path: Path, number: signal.Signals) -> None:
    """`wf` hands it on to torchrun, which hands it on to the processes that train, and waits."""
    process = started(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "saved; go on with training.resume_from=latest" in errors
    assert "Traceback" not in errors
    assert len(checkpoint.step_folders(tmp_path / "run" / "checkpoints")) == 1
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_when_one_process_dies_all_end(tmp_path: Path) -> None:
    process = started(tmp_path)
    os.kill(ranks_of(tmp_path)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 2, errors
    assert ranks_of(tmp_path) == []


@pytest.mark.slow
def test_nproc_trains_and_packs(tmp_path: Path) -> None:
    """`wf train --nproc 2`: the whole of a stage, sharded, its figures those of one process."""
    toy_files(tmp_path)
    settings = ["training.max_steps=2", "training.batch_size=2", "distributed=fsdp_multi"]
    command = [sys.executable, "-m", "wrinklefree.cli", "train", *overrides(tmp_path, *settings), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loading ") == 1  # the main process does the talking
    assert (tmp_path / "run" / "packed" / "model.safetensors").is_file()
    quality = json.loads((tmp_path / "run" / "results.json").read_text())
    assert quality["trained"]["ppl"] > 1
    assert rows(tmp_path / "run")[-1]["step"] == "2"
