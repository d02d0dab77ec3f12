"""The stages of LLM-TRM, whole: each trains its part and resumes to the same bits; what does not fit is one line."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from thinkers import overrides, resolved
from toyrun import rows
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.runs import launch, prerequisites
from wrinklefree.thinking import compare, loading, pairs_stage, stages
from wrinklefree.thinking.reply import reply
from wrinklefree.training import checkpoint

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def trained(toy: Path) -> Path:
    """The toy after recursion, injection and grpo, a few steps each."""
    stages.train_network(resolved(toy, "trm_recursion"), force=False)
    stages.train_adapter(resolved(toy, "trm_injection"), force=False)
    stages.reinforce(
        resolved(toy, "trm_grpo", "thinking.grpo.group_size=4", "thinking.grpo.max_answer_tokens=3"), force=False
    )
    return toy


def test_each_stage_trains_its_own_part(trained: Path) -> None:
    names = ("toy_trm_compressor", "toy_trm_recursion", "toy_trm_injection", "toy_trm_grpo")
    kept = [load_file(trained / name / "final" / "model.safetensors") for name in names]
    parts = ("compressor", "network", "adapter", "pause")
    changed = [
        {part for part in parts for key in a if key.startswith(part) and not torch.equal(a[key], b[key])}
        for a, b in itertools.pairwise(kept)
    ]
    assert changed[0] >= {"network"}
    assert "compressor" not in changed[0]
    assert changed[1] == {"adapter", "pause"}
    assert changed[2] <= {"adapter"}  # the start may have been the best


def test_a_stage_leaves_a_log_a_plot_and_figures(trained: Path) -> None:
    for name in ("toy_trm_recursion", "toy_trm_injection", "toy_trm_grpo"):
        assert (trained / name / "plots" / "loss.png").stat().st_size > 1000
        assert json.loads((trained / name / "results.json").read_text())
        header = (trained / name / "training_log.csv").read_text().splitlines()[0]
        assert "eval_accuracy" in header


def test_grpo_never_ends_below_its_start(trained: Path) -> None:
    """The start is measured and kept."""
    rows = (trained / "toy_trm_grpo" / "training_log.csv").read_text().splitlines()
    columns = rows[0].split(",")
    losses = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    measured = [float(row["eval_loss"]) for row in losses if row["eval_loss"]]
    assert losses[0]["step"] == "0"
    final = json.loads((trained / "toy_trm_grpo" / "results.json").read_text())
    assert final["eval_loss"] == min(measured) <= measured[0]


EACH = ["training.save_interval=1"]

# Stage, settings, and its checkpoints. With several losses per batch, there is none in the middle of a batch.
INTERRUPTED = {
    "recursion": ("recursion", ["training.save_interval=2"], [2, 4]),
    "final": ("recursion", ["thinking.network.mode=final", "training.max_steps=12", *EACH], [6, 12]),
    "injection": ("injection", ["training.save_interval=2"], [2, 4]),
    "grpo": ("grpo", ["training.save_interval=2"], [2, 4]),
    "updates": ("grpo", ["thinking.grpo.updates=2", *EACH], [2, 4]),
}


@pytest.mark.parametrize("case", INTERRUPTED)
def test_an_interrupted_stage_resumes_to_the_same_bits(trained: Path, tmp_path: Path, case: str) -> None:
    stage, settings, steps = INTERRUPTED[case]
    more = [*settings, "thinking.grpo.group_size=4", "thinking.grpo.max_answer_tokens=3"]
    more += ["training.keep_best=false", "training.patience=0"]
    run = {"recursion": stages.train_network, "injection": stages.train_adapter, "grpo": stages.reinforce}[stage]
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(resolved(trained, f"trm_{stage}", *more, f"output_dir={whole}"), False)
    assert [checkpoint.step_of(path) for path in checkpoint.step_folders(whole / "checkpoints")] == steps
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / f"step_{steps[-1]}")
    shutil.rmtree(again / "final")
    run(resolved(trained, f"trm_{stage}", *more, f"output_dir={again}", "training.resume_from=latest"), False)
    weights = [load_file(folder / "final" / "model.safetensors") for folder in (whole, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


BOTH = """
import json, os, sys
import torch.distributed as dist
from wrinklefree.cli import app
end, dist.destroy_process_group = dist.destroy_process_group, lambda: None
for words in json.loads(sys.argv[1]):
    code = app(words, prog_name="wf", standalone_mode=False)
    assert not code, code
end()
sys.stderr.flush()
os._exit(0)  # as `wf` does it, and why
"""  # two commands in one group of processes, for to start them takes longer than what they do


@pytest.mark.slow
def test_two_processes_make_the_pairs_of_one_and_train_alike(toy: Path, tmp_path: Path) -> None:
    """Each of two processes writes half of the thoughts, and sees half of every batch."""
    for name in ("lm", "toy_trm_compressor"):
        shutil.copytree(toy / name, tmp_path / name)
    program, lines = tmp_path / "both.py", []
    program.write_text(BOTH)
    for training, more in (("trm_pairs", ()), ("trm_recursion", ("training.batch_size=2",))):
        words = [*prerequisites.VERBS[training].split(), *overrides(tmp_path, training, *more)]
        words.remove(f"training={training}")
        lines.append(words)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, program, json.dumps(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, expected = tmp_path / "toy_trm_pairs", toy / "toy_trm_pairs"
    assert len(list(made.glob("thoughts-*.jsonl"))) == 2
    for shard in sorted(expected.glob("*.safetensors")):
        one, two = load_file(shard), load_file(made / shard.name)
        for name, tensor in one.items():  # states in batches of other sizes, which may round otherwise
            close = {"atol": 1e-2, "rtol": 1e-2} if tensor.is_floating_point() else {"atol": 0, "rtol": 0}
            torch.testing.assert_close(two[name], tensor, **close)
    stages.train_network(resolved(tmp_path, "trm_recursion", f"output_dir={tmp_path / 'one'}"), False)
    for mine, one in zip(rows(tmp_path / "toy_trm_recursion"), rows(tmp_path / "one"), strict=True):
        assert float(mine["train_loss"]) == pytest.approx(float(one["train_loss"]), rel=0.02)  # noise is each one's own


def test_every_way_to_think_is_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = compare.compare_ways(resolved(trained, "trm_eval", "training.eval_examples=12"), force=False)
    values = json.loads((out / "results.json").read_text())
    assert list(values["ways"]) == ["words", "nothing", "pause", "shuffled", "latent", "grpo", "oracle"]
    assert all(len(way["right"]) == values["problems"] for way in values["ways"].values())
    assert all(way["p50"] <= way["p95"] for name, way in values["ways"].items() if name != "oracle")
    assert (out / "plots" / "thinking.png").stat().st_size > 1000
    assert max(map(len, capsys.readouterr().out.splitlines()[:9])) <= 80
    compare.compare_ways(resolved(trained, "trm_eval", "training.eval_examples=8"), force=True)
    assert json.loads((out / "results.json").read_text())["problems"] < values["problems"]
    assert not (out / ".replaced").exists()


def test_a_thinker_answers_a_question(trained: Path) -> None:
    for folder in ("toy_trm_injection", "toy_trm_grpo"):
        assert isinstance(reply(str(trained / folder), "3 +2 ?", "latent", 4, 0.0, 0), str)
    words = reply(str(trained / "toy_trm_injection"), "3 +2 ?", "words", 12, 0.0, 0)
    assert words == reply(str(trained / "lm"), "3 +2 ?", "words", 12, 0.0, 0)
    with pytest.raises(UserError, match="cannot speak yet"):
        reply(str(trained / "toy_trm_recursion"), "3 +2 ?", "latent", 4, 0.0, 0)
    with pytest.raises(UserError, match="no thinker here"):
        reply(str(trained / "lm"), "3 +2 ?", "latent", 4, 0.0, 0)


def test_settings_that_an_earlier_stage_fixed_are_taken_over_or_refused(trained: Path) -> None:
    config = resolved(trained, "trm_injection", "thinking.d_compressed=256")
    loading.inherit(config, trained / "toy_trm_recursion")
    assert loading.settings_of(config).d_compressed == 32
    with pytest.raises(UserError, match=r"thinking.d_compressed: .* was made with 32"):
        loading.inherit(resolved(trained, "trm_injection", "thinking.d_compressed=16"), trained / "toy_trm_recursion")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "method.pairs.shard_size=1",
            "method.pairs.shard_size: unknown key (did you mean 'thinking.pairs.shard_size'?)",
        ),
        ("method.d_compressed=64", "method.d_compressed: unknown key (did you mean 'thinking.d_compressed'?)"),
        ("method.init=pca", "method.init: unknown key (did you mean 'thinking.init'?)"),
        ("method.grpo.updatez=4", "method.grpo.updatez: unknown key (did you mean 'thinking.grpo.updates'?)"),
        ("method=fairy2", "method=fairy2: a thinker has no method; name a quantized model by model=FOLDER"),
        (
            "thinking=x",
            "thinking=x: a training chooses this section; give its settings, as in thinking.d_compressed=64",
        ),
    ],
)
def test_settings_in_the_section_of_methods_are_one_line(override: str, message: str) -> None:
    result = CliRunner().invoke(app, ["trm", "pairs", "model=chains", override])
    assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")


@pytest.mark.parametrize("training", ["fairy2_w2", "full_precision"])
def test_settings_of_a_thinker_are_refused_by_other_trainings(training: str) -> None:
    with pytest.raises(UserError, match=r"^thinking\.d_compressed: has no effect, .* no section 'thinking'$"):
        load_config([f"training={training}", "thinking.d_compressed=64"])
    with pytest.raises(UserError, match="a stage of LLM-TRM: run it with `wf trm train`"):
        launch.run_stage(["model=chains", "training=trm_recursion"])


def test_a_thinker_of_version_0_1_is_read(toy: Path, tmp_path: Path) -> None:
    """Its settings were the method's, and there was no other section for them."""
    shutil.copytree(toy / "toy_trm_compressor" / "final", tmp_path / "old")
    file = tmp_path / "old" / checkpoint.CONFIG
    lines = [line for line in file.read_text().splitlines() if line != "method: null"]
    file.write_text("\n".join("method:" if line == "thinking:" else line for line in lines))
    assert "\nthinking:" not in file.read_text()
    (thinker, config), (_, today) = map(loading.load_thinker, (tmp_path / "old", toy / "toy_trm_compressor"))
    assert config == today
    assert loading.settings_of(config).d_compressed == len(thinker.compressor.weight) == 32


def test_a_broken_thinker_is_one_line(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "toy_trm_injection" / "final", tmp_path / "broken")
    file = tmp_path / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        loading.load_thinker(tmp_path / "broken")


def test_stages_name_what_has_to_come_first(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trm_pairs needs trm_compressor"):
        pairs_stage.make_pairs(resolved(toy, "trm_pairs", f"output_root={tmp_path}"), force=False)
    with pytest.raises(UserError, match=r"trm_grpo needs trm_injection, but .* run `wf trm inject model=[^`]*`$"):
        stages.reinforce(resolved(toy, "trm_grpo", f"output_root={tmp_path}"), force=False)


@pytest.mark.slow
def test_the_whole_chain_thinks_in_latents_what_it_thought_in_words(tmp_path: Path) -> None:
    """From nothing, with the settings as they are shipped: `runs/trm_cpu.sh` without GRPO."""
    from wrinklefree.commands import pretrain
    from wrinklefree.thinking import compressor as phase1

    given = ["model=chains", f"output_root={tmp_path}"]
    pretrain.run(given)
    phase1.make_compressor(load_config([*given, "training=trm_compressor"]), False)
    chain = {"pairs": pairs_stage.make_pairs, "recursion": stages.train_network, "injection": stages.train_adapter}
    for name, stage in {**chain, "eval": compare.compare_ways}.items():
        stage(load_config([*given, f"training=trm_{name}"]), False)
    values = json.loads((tmp_path / "chains_trm_eval" / "results.json").read_text())
    right = {name: way["accuracy"] for name, way in values["ways"].items()}
    assert right["words"] > 0.95
    assert max(right[name] for name in ("nothing", "pause", "shuffled")) < 0.4
    assert values["readout"] > 0.9
    assert right["latent"] > 0.8
