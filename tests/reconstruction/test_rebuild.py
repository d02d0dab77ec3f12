"""Blocks that are rebuilt: closer to the original's, resumable, and not ruled by a token with large activations."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, llama
from torch import Tensor
from toyrun import overrides, toy_files
from transformers import PreTrainedModel

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import BlockwiseConfig
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, quant_layers
from wrinklefree.methods.anemll import Config as Anemll
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Config as Fairy2
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.models.load import load_model
from wrinklefree.reconstruction.moments import Moments
from wrinklefree.reconstruction.rebuild import Rebuilding, token_errors, token_weights
from wrinklefree.runs import launch, rebuilding
from wrinklefree.runs.report import RESULTS, read_figures
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import train_stage
from wrinklefree.training import pacing

pytestmark = pytest.mark.numeric


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, VOCAB, (2, 16), generator=generator)} for _ in range(40)]


def rebuilding_of(method: QuantMethod, **settings: float) -> tuple[Rebuilding, PreTrainedModel]:
    original = llama().requires_grad_(False)
    student = method.prepare(copy.deepcopy(original).requires_grad_(True), batches())
    assert isinstance(student, PreTrainedModel)
    chosen = BlockwiseConfig(enabled=True, **settings)
    return Rebuilding(original, student, batches(), 4, chosen, nullcontext, 0), student


STEPS = 72

METHODS = [Fairy2(), BitDistill(scale_mode="learned"), Anemll(rank=2, attn_bits=2, attn_rank=2), Uniform(bits=2)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_training_a_block_brings_it_nearer_to_the_originals(method: QuantMethod) -> None:
    work, _ = rebuilding_of(method, lr=0.005, scale_lr=0.002)
    for number in range(2):
        report = work.rebuild(number, STEPS)
        assert report.trained < 0.98 * report.calibrated


def test_a_training_that_does_not_help_is_taken_back() -> None:
    work, _ = rebuilding_of(Fairy2(), lr=1e6, scale_lr=1e6)
    report = work.rebuild(0, STEPS)
    assert report.trained == report.calibrated
    weights = [token_weights(target) for target in work.target]
    inputs = rebuilding_of(Fairy2())[0].hidden
    work.hidden = inputs
    assert work.error(0, weights) == report.calibrated


def test_calibration_brings_a_model_nearer_than_its_plain_start() -> None:
    work, _ = rebuilding_of(Fairy2())
    weights = [token_weights(target) for target in work.outputs(work.original, work.target, 0)]
    work.target = list(work.outputs(work.original, work.target, 0))
    plain = work.error(0, weights)
    work, _ = rebuilding_of(Fairy2())
    assert work.rebuild(0, 0).calibrated < plain


def test_a_layer_that_never_runs_gets_scales_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    work, student = rebuilding_of(Fairy2())
    layer = next(iter(quant_layers(student).values()))
    layer.fit(torch.ones(layer.in_features))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for name, parameter in layer.named_parameters():
        if name != "weight":
            parameter.data.zero_()  # as before anything was fitted
    means = Moments.means
    monkeypatch.setattr(Moments, "means", lambda self: dict(list(means(self).items())[1:]))
    work.rebuild(0, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_what_a_block_costs_is_measured_without_changing_it() -> None:
    work, student = rebuilding_of(Fairy2())
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert work.seconds_of_a_step() > 0
    assert work.seconds_of_calibration() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_documents_in_a_row_do_not_see_each_other(tmp_path: Path) -> None:
    toy_files(tmp_path)
    with open_run(load_config(settings(tmp_path))) as run:
        found = rebuilding.rows(run, 4)
    assert all(batch["position_ids"].shape == batch["input_ids"].shape for batch in found)
    assert any((batch["position_ids"].diff() != 1).any() for batch in found)


def test_a_token_with_large_activations_counts_as_much_as_any_other() -> None:
    torch.manual_seed(0)
    target = torch.randn(1, 5, 8)
    target[0, 0] *= 1000
    output = target + 0.1 * target.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(torch.ones(8), dim=0)
    torch.testing.assert_close(token_errors(output, target, token_weights(target)), torch.full((1, 5), 0.01))


def test_a_token_that_the_student_makes_large_counts_at_most_one() -> None:
    work, _ = rebuilding_of(Fairy2())
    work.target = list(work.outputs(work.original, work.target, 0))
    weights = [token_weights(target) for target in work.target]
    before = work.error(0, weights)
    work.target[-1][0, 0] *= 1e-3  # next to it, the student's activation is a thousand times too large
    weights = [token_weights(target) for target in work.target]
    assert before < work.error(0, weights) <= before + 1 / (work.heldout * work.target[-1][..., 0].numel())


def test_the_same_seed_gives_the_same_bits() -> None:
    def weights() -> list[Tensor]:
        work, student = rebuilding_of(Fairy2())
        work.rebuild(0, 6)
        return [layer.weight.detach() for layer in quant_layers(student).values()]

    assert all(torch.equal(a, b) for a, b in zip(weights(), weights(), strict=True))


BLOCKWISE = ("training.start=calibrated", "training.blockwise.enabled=true", "training.blockwise.steps=4")
WIDE = "training.blockwise.batch_size=16"  # few batches, since each costs the same at this size


def settings(folder: Path, *more: str) -> list[str]:
    return overrides(folder, *BLOCKWISE, WIDE, "training.max_steps=0", *more)


def final(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


@pytest.fixture
def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was interrupted behind its first block, and said how to go on."""
    toy_files(tmp_path)
    said = list[str]()
    rebuild = Rebuilding.rebuild

    def dies(self: Rebuilding, number: int, steps: int) -> object:
        if number == 1:
            raise KeyboardInterrupt
        return rebuild(self, number, steps)

    with monkeypatch.context() as patch:
        patch.setattr(Rebuilding, "rebuild", dies)
        patch.setattr(rebuilding.log, "info", lambda text, *values: said.append(text))
        with pytest.raises(KeyboardInterrupt):
            train_stage(load_config(settings(tmp_path)), force=False)
    assert "go on with training.resume_from=latest" in said[-1]
    return tmp_path


def test_a_run_that_is_killed_between_blocks_goes_on_to_the_same_bits(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_stage(load_config(settings(interrupted, f"output_dir={interrupted / 'unbroken'}")), force=False)
    with pytest.raises(UserError, match="resume_from=latest"):
        train_stage(load_config(settings(interrupted)), force=False)
    rebuild, rebuilt = Rebuilding.rebuild, []

    def counted(self: Rebuilding, number: int, steps: int) -> object:
        rebuilt.append(number)
        return rebuild(self, number, steps)

    monkeypatch.setattr(Rebuilding, "rebuild", counted)
    launch.run_once(settings(interrupted), force=False, processes=None)
    assert rebuilt == [1]
    assert final(interrupted / "run") == final(interrupted / "unbroken")


def test_a_broken_block_is_named(interrupted: Path) -> None:
    (interrupted / "run" / "blocks" / "block_0.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"block_0\.safetensors: broken"):
        train_stage(load_config(settings(interrupted, "training.resume_from=latest")), force=False)


@pytest.mark.parametrize("key", ["training.blockwise.lr=0.5", "seed=7", "method.num_stages=1"])
def test_blocks_of_other_settings_are_refused(interrupted: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"blocks: its blocks were made with {key.partition('=')[0]}="):
        train_stage(load_config(settings(interrupted, "training.resume_from=latest", key)), force=False)


@pytest.mark.parametrize("text", ["[]", '{"steps": "four"}', '{"steps": 4, "settings": 3}'])
def test_a_broken_plan_is_named(interrupted: Path, text: str) -> None:
    (interrupted / "run" / "blocks" / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json: not the plan of a run"):
        train_stage(load_config(settings(interrupted, "training.resume_from=latest")), force=False)


def test_blocks_that_leave_no_time_for_a_step_are_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a machine that turned slow: what the minutes went into is kept."""
    toy_files(tmp_path)
    monkeypatch.setattr(pacing, "fitting", lambda step, *args: step)
    with caplog.at_level("WARNING", "wrinklefree"):
        train_stage(load_config(settings(tmp_path, "training.max_steps=null", "training.max_minutes=5")), force=False)
    assert "too little for one step" in caplog.text
    results = read_figures(tmp_path / "run" / RESULTS)
    assert results["training"]["steps"] == 0
    assert results["trained"]["nll"] == results["one_shot"]["nll"]
    assert (tmp_path / "run" / "packed" / "model.safetensors").exists()


def test_minutes_that_the_blocks_would_outlast_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    monkeypatch.setattr(Rebuilding, "seconds_of_calibration", lambda self: 40.0)
    monkeypatch.setattr(Rebuilding, "seconds_of_a_step", lambda self: 0.5)
    more = ("training.blockwise.steps=auto", "training.max_minutes=1")
    with pytest.raises(UserError, match=r"max_minutes=1: too little: rebuilding 2 blocks takes at least 88 seconds"):
        train_stage(load_config(settings(tmp_path, *more)), force=False)
    assert not (tmp_path / "run" / "blocks").exists()


def test_a_method_that_cannot_be_calibrated_is_refused(tmp_path: Path) -> None:
    toy_files(tmp_path)
    with pytest.raises(UserError, match=r"training\.start=calibrated: fairy2 .*q_proj"):
        train_stage(load_config(settings(tmp_path, "method.preset=paper")), force=False)


@pytest.mark.slow
def test_a_run_that_goes_on_from_a_checkpoint_shows_how_its_training_began(tmp_path: Path) -> None:
    toy_files(tmp_path)
    run = tmp_path / "run"
    more = ("training.save_interval=1", "training.save_total_limit=9")
    train_stage(load_config([*settings(tmp_path), "training.max_steps=2", *more]), force=False)
    whole = read_figures(run / RESULTS)
    assert whole["rebuilt"]
    assert not (run / "blocks").exists()
    resumed = [*settings(tmp_path), "training.max_steps=2", *more, f"training.resume_from={run}/checkpoints/step_1"]
    train_stage(load_config(resumed), force=False)
    again = read_figures(run / RESULTS)
    assert again["one_shot"] is None  # the blocks are gone, and nobody measures a model that never was
    assert again["trained"] == whole["trained"]


def test_a_plain_start_has_fitted_scales(tmp_path: Path) -> None:
    toy_files(tmp_path)
    still = ("training.max_steps=0", "method.rotate_inputs=false")
    plain = overrides(tmp_path, *still, f"output_dir={tmp_path / 'plain'}")
    train_stage(load_config(plain), force=False)
    rebuilt = overrides(tmp_path, *still, "training.blockwise.enabled=true", "training.blockwise.steps=0")
    train_stage(load_config(rebuilt), force=False)
    assert final(tmp_path / "run") == final(tmp_path / "plain")


@pytest.mark.slow
def test_a_plain_start_fits_scales_to_the_turned_weight(tmp_path: Path) -> None:
    """The weight lies in a file until its block is rebuilt, and turns only then."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[:, 3] *= 100  # what a rotation spreads over all columns
    toy_files(tmp_path, model)
    settings = ("training.max_steps=0", "training.blockwise.enabled=true", "training.blockwise.steps=0")
    train_stage(load_config(overrides(tmp_path, *settings)), force=False)
    trained, _ = load_model(tmp_path / "run" / "final")
    for layer in (layer for fqn, layer in quant_layers(trained).items() if fqn.endswith("up_proj")):
        before = layer.log_scales.detach().clone()
        layer.fit(torch.ones(layer.in_features))
        torch.testing.assert_close(layer.log_scales, before)
