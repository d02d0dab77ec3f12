"""The training loop: exact resume, stops and crashes that lose nothing, mistakes that are one line."""

import errno
import itertools
import math
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn
from toyrun import resolved, rows, run, tensors, toy_files
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core import files
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.models.load import load_model
from wrinklefree.objectives.base import Objective
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.runs.folder import resume_point, writing
from wrinklefree.training import checkpoint, saved_state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def at(step: int, act: Callable[[nn.Module], None]) -> Callable[[nn.Module, int], None]:
    """An `on_step` that acts before step `step` + 1."""
    return lambda model, now: act(model) if now == step else None


@pytest.fixture(autouse=True)
def _heed_ctrl_c() -> Iterator[None]:
    """A shell starts background jobs with SIGINT ignored; the tests below need Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt(model: nn.Module) -> None:
    signal.raise_signal(signal.SIGINT)  # handled before it returns; two of os.kill may arrive as one


def steps(folder: Path) -> list[str]:
    return [path.name for path in checkpoint.step_folders(folder / "run" / "checkpoints")]


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in (folder / "run" / "checkpoints").iterdir() if path.name.startswith(".")]


RESUMES = {
    "adamw": ["training.gradient_accumulation_steps=2"],
    "muon": ["training.gradient_accumulation_steps=2", "training.optimizer.name=muon"],
    "paper": ["method.preset=paper", "training.scheduler.name=cosine"],
    "bf16": ["training.precision=bf16", "training.gradient_checkpointing=true"],
    "ce": ["distillation=none", "training.log_interval=4"],
}


@pytest.mark.parametrize("settings", RESUMES.values(), ids=RESUMES)
def test_resuming_gives_the_bits_of_an_unbroken_run(folder: Path, settings: list[str]) -> None:
    """Weights, trained scales, optimizers, data position, random numbers and the log."""
    whole = [*settings, f"output_dir={folder / 'whole'}"]
    expected = run(resolved(folder, *whole))
    with pytest.raises(UserError, match="stopped at step 3, saved"):
        run(resolved(folder, *settings), on_step=at(2, interrupt))
    assert steps(folder) == ["step_3"]
    torch.rand(7)  # what happens elsewhere must not matter
    found = run(resolved(folder, *settings, "training.resume_from=latest"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    saved = [saved_state.load_state(folder / run / "checkpoints" / "step_6") for run in ("whole", "run")]
    assert len(list(tensors(saved[0]))) > 50
    for (name, a), (_, b) in zip(tensors(saved[0]), tensors(saved[1]), strict=True):
        assert torch.equal(a, b), name
    assert saved[0]["stream"] == saved[1]["stream"]
    assert [saved[0][k] for k in ("step", "tokens", "best_loss")] == [
        saved[1][k] for k in ("step", "tokens", "best_loss")
    ]
    assert rows(folder / "run") == rows(folder / "whole")


@pytest.mark.numeric
def test_training_lowers_the_loss_and_changes_masters_and_scales(folder: Path) -> None:
    before = {name: tensor.clone() for name, tensor in run(resolved(folder, "training.max_steps=0")).named_parameters()}
    assert not (folder / "run" / "checkpoints").exists()
    longer = ["training.max_steps=30", "distillation=none", "training.lr=0.01", f"output_dir={folder / 'run30'}"]
    config = resolved(folder, *longer)
    after = dict(run(config).named_parameters())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    losses = [float(row["train_loss"]) for row in rows(folder / "run30")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_log_has_a_row_per_step_and_evaluations_where_due(folder: Path) -> None:
    run(resolved(folder))
    logged = rows(folder / "run")
    assert [row["step"] for row in logged] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(row["eval_loss"]) for row in logged] == [False, True] * 3
    assert [int(row["tokens"]) for row in logged] == [32 * step for step in range(1, 7)]
    assert all(float(row["lr"]) > 0 for row in logged)


@pytest.mark.numeric
def test_gradient_checkpointing_gives_the_same_losses_and_a_second_forward(folder: Path) -> None:
    calls: list[int] = []

    def watch(model: nn.Module) -> None:
        model.get_submodule("model.layers.0.input_layernorm").register_forward_hook(lambda *args: calls.append(1))

    settings = ["training.eval_interval=9", "training.eval_tokens=32"]
    run(resolved(folder, *settings), on_step=at(0, watch))
    plain = len(calls)
    more = [*settings, "training.gradient_checkpointing=true", f"output_dir={folder / 'checkpointed'}"]
    run(resolved(folder, *more), on_step=at(0, watch))
    assert len(calls) == 2 * plain + 6
    for plain, other in zip(rows(folder / "run"), rows(folder / "checkpointed"), strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=1e-5)


@pytest.mark.slow
def test_a_compiled_run_gives_nearly_the_same_losses(folder: Path) -> None:
    run(resolved(folder))
    run(resolved(folder, "training.compile=true", f"output_dir={folder / 'compiled'}"))
    for plain, other in zip(rows(folder / "run"), rows(folder / "compiled"), strict=True):
        assert float(other["train_loss"]) == pytest.approx(float(plain["train_loss"]), rel=1e-3)


@pytest.mark.numeric
@pytest.mark.parametrize("distillation", ["none", "logits"])
def test_accumulation_is_a_larger_batch(folder: Path, distillation: str) -> None:
    """Token for token: blocks have unlike numbers of labels, and a mean of means would differ by some 1e-3."""
    more = [f"distillation={distillation}", "training.max_seq_length=11"]
    run(resolved(folder, "training.batch_size=4", *more))
    run(
        resolved(
            folder,
            "training.gradient_accumulation_steps=4",
            "training.batch_size=1",
            *more,
            f"output_dir={folder / 'parts'}",
        )
    )
    for whole, parts in zip(rows(folder / "run"), rows(folder / "parts"), strict=True):
        assert parts["tokens"] == whole["tokens"]
        for name in ("train_loss", "train_ce", "grad_norm"):
            # Sums in another order may turn a code over, and one in 50,000 is seen in the fifth digit.
            assert float(parts[name]) == pytest.approx(float(whole[name]), rel=1e-4), name


def without_labels(when: Callable[[int], bool]) -> Callable[[PreTrainedModel, PreTrainedModel], Objective]:
    """Cross entropy that finds no label in the batches `when` says, by their number from 0."""

    def make(student: PreTrainedModel, teacher: PreTrainedModel) -> Objective:
        numbers = itertools.count()

        class Unlabelled(LanguageModelling):
            def prepare(self, batch: Batch) -> Batch:
                if when(next(numbers)):
                    batch["labels"] = torch.full_like(batch["labels"], -100)
                return batch

        return Unlabelled(student, DistillationConfig(name="none"))

    return make


def test_batches_without_labels_count_for_nothing(folder: Path) -> None:
    """One among others changes no loss; where there is no other, nothing is learned and nothing breaks."""
    some = ["training.gradient_accumulation_steps=2", "training.max_steps=3"]
    run(resolved(folder, *some), objective=without_labels(lambda number: number % 2 == 1))
    losses = [float(row["train_loss"]) for row in rows(folder / "run")]
    assert all(3 < loss < 6 for loss in losses)  # ln 96 = 4.56
    none = resolved(folder, "training.max_steps=2", f"output_dir={folder / 'none'}")
    trained = run(none, objective=without_labels(lambda number: True))
    start = run(resolved(folder, "training.max_steps=0", f"output_dir={folder / 'start'}")).state_dict()
    assert [float(row["train_loss"]) for row in rows(folder / "none")] == [0.0, 0.0]
    assert all(torch.equal(start[name], tensor) for name, tensor in trained.state_dict().items())


def test_ctrl_c_twice_stops_at_once(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(resolved(folder), on_step=at(2, lambda model: (interrupt(model), interrupt(model))))
    assert not (folder / "run" / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), MemoryError()])
def test_an_exception_in_the_middle_of_a_save_leaves_only_whole_checkpoints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = itertools.count(1)
    write = PreTrainedTokenizerFast.save_pretrained

    def failing(self: PreTrainedTokenizerFast, path: Path, **options: object) -> object:
        if next(calls) == 2:
            raise error
        return write(self, path, **options)

    config = resolved(folder, "training.save_interval=2")
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", failing)
    with pytest.raises(type(error)):
        run(config)
    assert steps(folder) == ["step_2"]
    assert leftovers(folder) == []
    run(resolved(folder, "training.resume_from=latest"))
    assert rows(folder / "run")[-1]["step"] == "6"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from toyrun import resolved, run
save, calls = torch.save, []
def killed(*args, **kwargs):
    save(*args, **kwargs)
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
run(resolved(Path({folder!r}), "training.save_interval=2"))
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_save_leaves_only_whole_checkpoints(folder: Path) -> None:
    program = KILLED.format(tests=str(Path(__file__).parents[1]), folder=str(folder))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert steps(folder) == ["step_2"]
    assert leftovers(folder) == [".step_4.tmp"]
    run(resolved(folder, "training.resume_from=latest", "training.save_interval=2"))
    assert steps(folder) == ["step_4", "step_6"]
    assert leftovers(folder) == []


@pytest.mark.parametrize("limit", [30_000, 400_000], ids=["weights", "optimizer"])
def test_a_full_disk_is_said_and_earlier_checkpoints_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Real writes that fail: a limit on the size of a file stands for the disk's."""
    monkeypatch.setattr(files, "FULL", (errno.EFBIG,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(model: nn.Module) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        with pytest.raises(UserError, match=r"disk full while writing .*step_4"):
            run(resolved(folder, "training.save_interval=2"), on_step=at(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps(folder) == ["step_2"]
    assert leftovers(folder) == []
    assert saved_state.load_state(folder / "run" / "checkpoints" / "step_2")["step"] == 2


def test_a_weight_that_is_not_finite_stops_with_step_layer_and_last_good_checkpoint(folder: Path) -> None:
    def poison(model: nn.Module) -> None:
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = math.nan
        model.get_parameter("model.layers.1.mlp.up_proj.log_scales").data[:] = math.nan
        model.eval(), model.train()  # a write through .data leaves no trace

    with pytest.raises(UserError, match=r"step 4: loss is nan, weight model.layers.1.mlp.up_proj.*step_2;") as stopped:
        run(resolved(folder, "training.save_interval=2"), on_step=at(3, poison))
    assert "\n" not in str(stopped.value)
    assert steps(folder) == ["step_2"]
    run(resolved(folder, "training.resume_from=latest"))
    assert not (folder / "run" / ".final.tmp").exists()


def test_an_output_that_is_not_finite_is_traced_to_its_layer(folder: Path) -> None:
    def overflow(model: nn.Module) -> None:
        layer = model.get_submodule("model.layers.0.mlp.down_proj")
        layer.register_forward_hook(lambda module, inputs, output: output * math.inf)

    with pytest.raises(UserError, match=r"step 1: .*layer model.layers.0.mlp.down_proj .*no checkpoint was saved yet"):
        run(resolved(folder), on_step=at(0, overflow))


def test_a_gradient_that_is_not_finite_is_named(folder: Path) -> None:
    def overflow(model: nn.Module) -> None:
        model.get_parameter("model.norm.weight").register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(UserError, match=r"step 1: .*gradient of model.norm.weight is not finite"):
        run(resolved(folder), on_step=at(0, overflow))


def test_an_existing_run_is_refused_unless_forced(folder: Path) -> None:
    run(resolved(folder))
    (folder / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds a run.*resume_from=latest.*--force"):
        run(resolved(folder))
    assert (folder / "run" / "final" / "model.safetensors").is_file()
    assert resume_point(resolved(folder), force=True) is None
    assert (folder / "run" / "final" / "model.safetensors").is_file()  # until nothing can be wrong any more
    with writing(resolved(folder), None, force=True):
        assert {path.name for path in (folder / "run").iterdir()} == {"notes.txt", ".replaced"}
    assert (folder / "run" / "final" / "model.safetensors").is_file()  # nothing was saved in its place
    run(resolved(folder, "training.max_steps=0"), force=True)
    assert {path.name for path in (folder / "run").iterdir()} == {"notes.txt", "final", "training_log.csv"}


def test_keep_best_returns_the_best_model_also_across_a_resume(folder: Path) -> None:
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    seen: dict[int, torch.Tensor] = {}
    now = [0]

    def evaluate(model: nn.Module) -> dict[str, float]:
        seen[now[0]] = model.get_parameter("model.norm.weight").detach().clone()
        return {"eval_loss": losses[now[0]]}

    def count(stop: int) -> Callable[[nn.Module, int], None]:
        def on_step(model: nn.Module, step: int) -> None:
            now[0] = step + 1
            if step + 1 == stop:
                interrupt(model)

        return on_step

    settings = ["training.keep_best=true", "training.max_steps=8"]
    with pytest.raises(UserError, match="stopped at step 5"):
        run(resolved(folder, *settings), evaluate=evaluate, on_step=count(5))
    resumed = resolved(folder, *settings, "training.resume_from=latest")
    model = run(resumed, evaluate=evaluate, on_step=count(0))
    assert list(seen) == [2, 4, 6, 8]
    assert torch.equal(model.get_parameter("model.norm.weight"), seen[4])
    assert not torch.equal(seen[4], seen[8])
    final, _ = load_model(folder / "run" / "final")
    assert torch.equal(final.get_parameter("model.norm.weight"), seen[4])


def test_only_the_newest_checkpoints_are_kept(folder: Path) -> None:
    run(resolved(folder, "training.save_interval=1", "training.save_total_limit=3"))
    assert steps(folder) == ["step_4", "step_5", "step_6"]


def test_frozen_parameters_do_not_move(folder: Path) -> None:
    start = run(resolved(folder, "training.max_steps=0", f"output_dir={folder / 'start'}")).state_dict()
    end = run(resolved(folder, "training.freeze_names=[embed_tokens,layers.0]"))
    for name, parameter in end.named_parameters():
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(parameter, start[name]) == frozen, name
        assert parameter.requires_grad != frozen
    with pytest.raises(UserError, match=r"freeze_names: 'layers.7' matches no parameter"):
        run(resolved(folder, "training.freeze_names=[layers.7]", f"output_dir={folder / 'wrong'}"))


@pytest.fixture
def interrupted(folder: Path) -> Path:
    """A run that was stopped at step 3 of 6."""
    with pytest.raises(UserError, match="stopped at step 3"):
        run(resolved(folder), on_step=at(2, interrupt))
    return folder


@pytest.mark.parametrize("where", ["run", "run/checkpoints", "run/checkpoints/step_3"])
def test_resume_from_takes_a_run_or_a_checkpoint(interrupted: Path, where: str) -> None:
    elsewhere = [f"training.resume_from={interrupted / where}", f"output_dir={interrupted / 'elsewhere'}"]
    run(resolved(interrupted, *elsewhere))
    assert [row["step"] for row in rows(interrupted / "elsewhere")] == ["4", "5", "6"]


def test_checkpoints_are_uploaded_and_resumed_from_their_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the guide's `.pt` at the end of the address, too."""
    url = f"memory://bucket/fairy2/{folder.name}"
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(folder / "cache"))
    expected = run(resolved(folder, "training.save_interval=3", f"training.upload_to={url}"))
    try:
        resumed = [f"training.resume_from={url}/step_3.pt", f"output_dir={folder / 'resumed'}"]
        found = run(resolved(folder, *resumed))
        with pytest.raises(UserError, match="nothing there"):
            run(resolved(folder, f"training.resume_from={url}/step_4", f"output_dir={folder / 'none'}"))
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_settings_changed_at_a_resume_take_effect(interrupted: Path) -> None:
    rate = "training.optimizer.lr=0.0005"
    scales = "training.optimizer.scale_lr=0.002"
    run(resolved(interrupted, "training.resume_from=latest", rate, scales, "training.scheduler.warmup_ratio=0"))
    logged = rows(interrupted / "run")
    assert float(logged[3]["lr"]) == pytest.approx(0.0005)
    state = saved_state.load_state(interrupted / "run" / "checkpoints" / "step_6")
    assert {group["peak_lr"] for group in state["optimizers"][0]["param_groups"]} == {0.0005, 0.002}


BROKEN = {
    "truncated weights": ("model.safetensors", lambda data: data[: len(data) // 2], "truncated"),
    "foreign weights": ("model.safetensors", lambda data: b"not this" * 9, "truncated or not safetensors"),
    "no weights": ("model.safetensors", None, "missing; this is not a whole checkpoint"),
    "truncated state": ("state/trainer.pt", lambda data: data[: len(data) // 2], "truncated or not a trainer state"),
    "empty state": ("state/trainer.pt", lambda data: b"", "truncated or not a trainer state"),
    "foreign state": ("state/trainer.pt", lambda data: b"garbage", "truncated or not a trainer state"),
    "no state": ("state/trainer.pt", None, "no checkpoint with state/trainer.pt"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_checkpoint_is_one_line(interrupted: Path, damage: str) -> None:
    name, change, message = BROKEN[damage]
    path = interrupted / "run" / "checkpoints" / "step_3"
    file = path / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=message) as refused:
        run(resolved(interrupted, f"training.resume_from={path}"))
    assert "\n" not in str(refused.value)


MISFITS = {
    "another method": (["method.preset=paper"], "does not fit this model and method; first mismatch: .*log_"),
    "another optimizer": (["training.optimizer.name=muon"], "other training.optimizer or freeze_names"),
    "fewer parameters": (["training.freeze_names=[layers.0]"], "other training.optimizer or freeze_names"),
    "another seed": (["seed=7"], "saved with seed=42"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_checkpoint_of_another_run_is_refused(interrupted: Path, misfit: str) -> None:
    settings, message = MISFITS[misfit]
    with pytest.raises(UserError, match=message):
        run(resolved(interrupted, "training.resume_from=latest", *settings))


def test_nothing_to_resume_from_is_an_error(folder: Path) -> None:
    with pytest.raises(UserError, match="resume_from=latest: no checkpoint"):
        run(resolved(folder, "training.resume_from=latest"))


def test_a_checkpoint_is_a_hugging_face_folder(interrupted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = interrupted / "run" / "checkpoints" / "step_3"
    names = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    wanted = {"model.safetensors", "config.json", "tokenizer.json", "wrinklefree.yaml", "state/trainer.pt"}
    assert wanted <= names
    assert AutoTokenizer.from_pretrained(path)("w3 w5").input_ids == [3, 5]
    plain = AutoModelForCausalLM.from_pretrained(path)
    trained, _ = load_model(path)
    assert not quant_layers(plain)
    assert torch.equal(plain.model.norm.weight, trained.model.norm.weight)
