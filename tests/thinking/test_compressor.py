"""Phase 1 of LLM-TRM: PCA is the optimum, sums of parts are the whole, padding does not count, the guide's lines."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file
from tiny import VOCAB, ids, llama
from torch import Tensor
from toyrun import toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data.packing import make_batch, pack, padding
from wrinklefree.distributed.world import ALONE
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import compressor, gathering, loading
from wrinklefree.thinking.bench import open_bench
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.moments import Moments, principal_axes, tied_error, weighted_code
from wrinklefree.thinking.network import DimensionCompressor
from wrinklefree.thinking.reading import compare_readings
from wrinklefree.thinking.reconstruction import (
    TRAINED_METRICS,
    MarkedStream,
    Reconstruction,
    added,
    mark,
    metrics,
    real_states,
    sums_of,
)

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "src" / "train" / "phase1_compressor.py"))
PAD = VOCAB - 1
WIDTH, SIZE = 64, 8

# Settings of a run of a second on the toy model.
SMALL = [
    "training.final_eval_tokens=128",
    "training.eval_tokens=64",
    "training.precision=fp32",
    "training.log_interval=1",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressor")
    toy_files(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a toy model and text."""
    for name in ("toy", "text"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def decoder() -> BodyAndHead:
    return BodyAndHead(llama().requires_grad_(False))


@pytest.fixture(scope="module")
def states(decoder: BodyAndHead) -> Tensor:
    """Some 1,500 states [N, D] of the toy model."""
    return real_states(decoder, mark(rows(64), PAD))


def rows(count: int, length: int = 24) -> Batch:
    """Rows of random words, each one document."""
    generator = torch.Generator().manual_seed(count)
    blocks = torch.zeros(count, 3, length, dtype=torch.int64)
    blocks[:, 0] = torch.randint(0, VOCAB - 1, (count, length), generator=generator)
    blocks[:, 1, 0] = 1
    blocks[:, 2, 1:] = 1
    return make_batch(blocks)


def gathered(states: Tensor) -> Gathered:
    moments = Moments.zeros(states.shape[1])
    moments.add(states)
    return Gathered(moments)


def config(*more: str) -> Config:
    """A run on the toy model in the working folder."""
    given = ["training=trm_compressor", "model=./toy", "data=local", "data.path=text", f"thinking.d_compressed={SIZE}"]
    given += [
        "training.max_seq_length=16",
        "training.batch_size=4",
        "thinking.moment_tokens=512",
        "output_dir=run",
        *SMALL,
    ]
    return load_config([*given, *SMALL, *more])


def script(*words: str) -> int:
    """`python -m src.train.phase1_compressor` in this process; its exit code."""
    try:
        SCRIPT["cli"].reported(lambda: SCRIPT["carry_out"](SCRIPT["arguments"](list(words))))
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def toy_script(*words: str) -> list[str]:
    """The script's words for a run on the toy model."""
    flags = ["--model_name", "./toy", "--no_wandb", "--d_compressed", str(SIZE), "--batch_size", "4"]
    flags += ["--max_seq_length", "16", "--num_samples", "64", "--output_dir", "out"]
    return [*flags, *words, "data=local", "data.path=text", *SMALL]


# --- what is counted


def test_the_head_reads_the_logits_in_the_states() -> None:
    model = llama()
    decoder = BodyAndHead(model)
    batch = {"input_ids": ids()}
    states, head = decoder.project(decoder.states(batch))
    torch.testing.assert_close(F.linear(states, head), model(**batch).logits)


def test_padding_does_not_count(decoder: BodyAndHead) -> None:
    """The same documents alone, and with padding behind them: loss, metrics and moments are the same."""
    documents = [torch.tensor([[3, 4, 5, PAD], [1, 0, 0, 0], [0, 1, 1, 1]]), torch.tensor([[9, PAD], [1, 0], [0, 1]])]
    bare = mark(make_batch(torch.cat(documents, dim=1)[None]), PAD)
    padded = mark(make_batch(pack(documents, 16, PAD)), PAD)
    found = []
    for batch in (bare, padded):
        assert int((batch["labels"][:, 1:] != IGNORE).sum()) == 6  # as the trainer counts them
        torch.manual_seed(0)
        objective = Reconstruction(DimensionCompressor(WIDTH, SIZE), decoder, "mse")
        ((loss, values),) = objective(batch)
        assert set(values) == set(TRAINED_METRICS)
        figures = objective.measure([batch], {"": objective.compressor})[0][""]
        found.append({"train": loss.item(), **{name: float(value) for name, value in values.items()}, **figures})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["train"] == pytest.approx(found[0]["mse"], rel=1e-5)


def test_what_looks_like_padding_inside_a_block_counts() -> None:
    """End-of-sequence tokens that are text, and a document's first token at the end of a block."""
    block = torch.cat([padding(2, PAD), torch.tensor([[5, PAD, 7], [1, 0, 1], [0, 1, 0]])], dim=1)
    assert (mark(make_batch(block[None]), PAD)["labels"][0, 1:] != IGNORE).all()


def test_metrics_are_what_they_are_called_and_exact_over_batches(states: Tensor) -> None:
    torch.manual_seed(1)
    rebuilt = DimensionCompressor(WIDTH, SIZE)(states).detach()
    parts = [sums_of(x, y) for x, y in zip(states.split(77), rebuilt.split(77), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = added(total, part)
    x, y, mean = states.double(), rebuilt.double(), states.double().mean(0)
    expected = {
        "mse": F.mse_loss(y, x),
        "cosine_similarity": F.cosine_similarity(x, y).mean(),
        "relative_error": (y - x).norm() / x.norm(),
        "variance_ratio": (y.var(0) / x.var(0)).mean(),
        "mean_only_cosine": F.cosine_similarity(x, mean.expand_as(x)).mean(),
        "r2": 1 - (y - x).square().sum() / (x - mean).square().sum(),
    }
    assert {k: float(v) for k, v in metrics(total).items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-6
    )


# --- optima


def test_the_floor_of_pca_is_the_measured_error(decoder: BodyAndHead, states: Tensor) -> None:
    found = gathered(states)
    for size in (1, SIZE, WIDTH):
        made = found.pca.put(DimensionCompressor(WIDTH, size))
        measured = F.mse_loss(made(states), states).item()
        assert found.pca.mse(found.moments, size) == pytest.approx(measured, rel=1e-4, abs=1e-6)
        assert tied_error(found.moments, size) == pytest.approx(measured, rel=1e-4, abs=1e-6)
    figures, count = Reconstruction(made, decoder, "mse").measure([mark(rows(64), PAD)], {"all": made})
    assert count == len(states)
    assert figures["all"]["r2"] == pytest.approx(1, abs=1e-5)
    assert figures["all"]["top1_agreement"] > 0.99


def test_training_comes_near_pca_and_not_below(states: Tensor) -> None:
    torch.manual_seed(0)
    trained = DimensionCompressor(WIDTH, SIZE)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        F.mse_loss(trained(states), states).backward()
        optimizer.step()
        optimizer.zero_grad()
    floor = gathered(states).pca.mse(gathered(states).moments, SIZE)
    assert floor <= F.mse_loss(trained(states), states).item() < 1.02 * floor


def test_fisher_has_the_least_error_in_its_metric_and_less_kl(decoder: BodyAndHead, states: Tensor) -> None:
    """Less than PCA and a random metric in its objective; and in the KL itself, which that stands for."""
    stream = MarkedStream(Repeated(rows(64)), PAD)
    found = gathering.gather_moments(decoder, stream, ALONE, blocks=64, batch_size=64, width=WIDTH, weighted=True)
    assert found.mean_metric is not None
    noise = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes = {
        "fisher": found.fisher,
        "pca": found.pca,
        "random": gathering.Code(*weighted_code(found.moments, noise @ noise.T, WIDTH)),
    }
    compressors = {name: code.put(DimensionCompressor(WIDTH, SIZE, tied=False)) for name, code in codes.items()}
    objective = Reconstruction(compressors["fisher"], decoder, "fisher", found.mean_metric)
    figures, _ = objective.measure([mark(rows(64), PAD)], compressors)
    assert figures["fisher"]["loss"] < min(figures["pca"]["loss"], figures["random"]["loss"])
    assert figures["fisher"]["kl"] < min(figures["pca"]["kl"], figures["random"]["kl"])
    weight = compressors["fisher"].weight
    loss = objective.loss(states, compressors["fisher"](states))
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.norm() < 1e-3 * loss / weight.detach().norm()  # nothing to gain in any direction


def test_the_fisher_metric_is_the_kl_to_second_order(decoder: BodyAndHead, states: Tensor) -> None:
    """Of small errors that know nothing of the state."""
    stream = MarkedStream(Repeated(rows(64)), PAD)
    found = gathering.gather_moments(decoder, stream, ALONE, blocks=64, batch_size=64, width=WIDTH, weighted=True)
    objective = Reconstruction(DimensionCompressor(WIDTH, SIZE), decoder, "fisher", found.mean_metric)
    rebuilt = states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    assert objective.loss(states, rebuilt).item() == pytest.approx(
        compare_readings(decoder, states, rebuilt).kl.item(), rel=0.02
    )


class Repeated:
    """A stream of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0}


def test_kl_trains_the_kl(folder: Path) -> None:
    """From PCA, which it leaves behind."""
    compressor.make_compressor(
        config("thinking.objective=kl", "training.max_steps=60", "training.keep_best=true"), False
    )
    figures = json.loads(Path("run/results.json").read_text())
    assert figures["kl"] < figures["pca"]["kl"]


# --- runs


def test_a_run_is_pca_of_all_the_states_it_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = compressor.make_compressor(config(), False)
    thinker, _ = loading.load_thinker(final)
    read = gathering.read_gathered(final)
    assert int(read.moments.count) == 512
    axes = principal_axes(read.moments.second)[1][:SIZE]
    torch.testing.assert_close(thinker.compressor.weight.double(), axes, atol=1e-6, rtol=0)
    figures = json.loads((folder / "run" / "results.json").read_text())
    assert figures["hidden_size"] == WIDTH
    assert figures["mse"] == figures["pca"]["mse"]
    assert figures["forward_tokens"] == {"moments": 512, "training": 0, "heldout": 112}
    printed = capsys.readouterr().out
    assert "R^2, centred" in printed
    assert "wrote run/" in printed
    assert "next: wf trm pairs" in printed
    with pytest.raises(UserError, match="already holds a run"):
        compressor.make_compressor(config(), False)
    compressor.make_compressor(config(), True)


def test_the_pass_sees_every_block_once_however_it_is_cut(folder: Path) -> None:
    """Batches of 3 or 7 of 25 blocks, and all states at once: one covariance."""
    settings = ["thinking.moment_tokens=400", "training.batch_size="]
    found = [
        open_bench(one).gather().moments for one in (config(settings[0], settings[1] + size) for size in ("3", "7"))
    ]
    assert [int(moments.count) for moments in found] == [400, 400]
    torch.testing.assert_close(found[0].outer, found[1].outer, rtol=1e-5, atol=1e-4)
    one = config(settings[0], settings[1] + "25")
    bench = open_bench(one)
    x = real_states(bench.decoder, next(bench.stream())).double()
    torch.testing.assert_close(found[0].covariance, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)


def test_text_is_not_counted_over_and_over(folder: Path) -> None:
    one = config("thinking.moment_tokens=1000000")
    count = int(open_bench(one).gather().moments.count)
    assert 2000 < count < 2600  # 57 documents of 41 tokens, and the rest of the last batch


def test_two_processes_are_one(folder: Path) -> None:
    """The same moments and weights from two CPU processes with 2 sequences each as from one with 4, trained too."""
    words = toy_script("--num_epochs", "1", "training.gradient_accumulation_steps=1", "training.save_interval=8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "src.train.phase1_compressor", *words, "--batch_size", "2", "--output_dir", str(folder / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("toy", "text"):
        command = [str(folder / name) if word == f"./{name}" else word for word in command]
    command = [f"data.path={folder / 'text'}" if word == "data.path=text" else word for word in command]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert script(*words) == 0
    names = {"stage1a", "stage1a_final", "stage1a_step8", "stage1a_step16"}
    assert {path.name for path in (folder / "two").iterdir()} == names
    assert {path.name for path in (folder / "out").iterdir()} == names
    two, one = (load_file(folder / name / "stage1a_final" / gathering.FILE) for name in ("two", "out"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-4)
    two, one = (load_file(folder / name / "stage1a_final" / "model.safetensors") for name in ("two", "out"))
    torch.testing.assert_close(two["compressor.weight"], one["compressor.weight"], atol=1e-4, rtol=0)


def test_stage_1b_solves_the_mixture(folder: Path) -> None:
    thoughts = folder / "thoughts.jsonl"
    lines = (json.dumps({"text": " ".join(f"w{(3 * n + i) % 20}" for i in range(30))}) for n in range(40))
    thoughts.write_text("\n".join(lines))
    assert script(*toy_script()) == 0
    again = [word for word in toy_script("--stage", "1b", "thinking.thought_share=0.25") if word != "data.path=text"]
    assert script(*again, f"data.path={thoughts}") == 0
    first, second = (gathering.read_gathered(folder / "out" / f"stage{stage}_final").moments for stage in ("1a", "1b"))
    one = config(f"data.path={thoughts}", "thinking.moment_tokens=1024")
    alone = open_bench(one).gather().moments
    expected = 0.75 * first.second + 0.25 * alone.second
    torch.testing.assert_close(second.second, expected, rtol=1e-4, atol=1e-5)
    thinker, _ = loading.load_thinker(folder / "out" / "stage1b_final.pt")  # as the guide writes it
    projection = (thinker.compressor.weight.T @ thinker.compressor.weight).double()
    axes = principal_axes(expected)[1][:SIZE]
    torch.testing.assert_close(projection, axes.T @ axes, atol=1e-3, rtol=0)


def test_stage_1b_from_random_weights_goes_on_from_stage_1a(folder: Path) -> None:
    compressor.make_compressor(config(), False)
    more = ["thinking.init=orthogonal", "training.start_from=[run/final.pt]", "output_dir=second"]
    compressor.make_compressor(config(*more), False)
    first, second = (loading.load_thinker(Path(name))[0].compressor.weight for name in ("run", "second"))
    assert torch.equal(first, second)


def test_a_sweep_is_one_pass_and_leaves_a_table_and_a_plot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the model in the package; the guide's widest D' is wider than its states, and left out."""
    words = ["--model_name", "tiny", "--no_wandb", "--sweep", "--sweep_d_values", "16", "64", "1024"]
    words += ["data=local", "data.path=text", "--num_samples", "40", "--max_seq_length", "32", "--output_dir", "sweep"]
    assert script(*words, *SMALL) == 0
    out, err = capsys.readouterr()
    assert "D'=1024 left out: the model's hidden states have 256 entries" in err
    assert err.count("states of 256 dimensions") == 1
    written = json.loads(Path("sweep/sweep.json").read_text())
    assert [row["d_compressed"] for row in written["rows"]] == [16, 64]
    assert written["rows"][0]["kl"] > written["rows"][1]["kl"]
    assert written["forward_tokens"]["moments"] == 40 * 32
    assert Path("sweep/plots/sweep.png").read_bytes()[:4] == b"\x89PNG"
    weights = [loading.load_thinker(Path(f"sweep/d{d}/stage1a_final"))[0].compressor.weight for d in (16, 64)]
    assert torch.equal(weights[0], weights[1][:16])
    assert "16x" in out
    assert script(*words, *SMALL) == 2


def test_a_resumed_training_ends_the_same(folder: Path) -> None:
    steps = ["thinking.init=orthogonal", "training.max_steps=6", "training.save_interval=3"]
    compressor.make_compressor(config(*steps), False)
    again = ["output_dir=again", "training.resume_from=run/checkpoints/step_3.pt"]
    compressor.make_compressor(config(*steps, *again), False)
    whole, halves = (loading.load_thinker(Path(name))[0].compressor.weight for name in ("run", "again"))
    assert torch.equal(whole, halves)


# --- errors


def test_what_a_user_can_mend_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*words: str) -> str:
        assert script(*words) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        return line

    assert "hidden states have 64 entries" in fails(*toy_script("--d_compressed", "65"))
    assert "run `python -m src.train.phase1_compressor --stage 1a" in fails(*toy_script("--stage", "1b"))
    assert "leave it out" in fails(*toy_script("--num_workers", "2"))
    assert "has no effect" in fails(*toy_script("training.gradient_checkpointing=true"))
    assert "no size between 1 and 64" in fails(*toy_script("--sweep", "--sweep_d_values", "100"))
    assert "--sweep" in fails(*toy_script("--sweep", "--stage", "1b"))
    assert "64 positions" in fails(*toy_script("--max_seq_length", "65"))
    assert not Path("out").exists()
    assert script(*toy_script()) == 0
    assert "d_compressed 8, this run has 4" in fails(*toy_script("--stage", "1b", "--d_compressed", "4"))
    assert "objective=mse, this run has fisher" in fails(*toy_script("--stage", "1b", "--objective", "fisher"))
    moments = Path("out/stage1a_final") / gathering.FILE
    moments.write_bytes(moments.read_bytes()[:100])
    assert "broken" in fails(*toy_script("--stage", "1b"))
    moments.unlink()
    assert "run stage 1a again" in fails(*toy_script("--stage", "1b"))
    weights = Path("out/stage1a_final/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "truncated" in fails(*toy_script("--stage", "1b"))


# --- the guide

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
    values = yaml.safe_load(capsys.readouterr().out)
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
