"""A run of phase 1 is PCA of all states that it read, however it is cut, continued or swept; mistakes are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from phase1 import ROOT, script
from safetensors.torch import load_file
from toyrun import toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.thinking import compressor, gathering, loading
from wrinklefree.thinking.bench import open_bench
from wrinklefree.thinking.moments import principal_axes
from wrinklefree.thinking.reconstruction import real_states

pytestmark = pytest.mark.numeric
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


def toy_script(*words: str) -> list[str]:
    """The script's words for a run on the toy model."""
    flags = ["--model_name", "./toy", "--no_wandb", "--d_compressed", str(SIZE), "--batch_size", "4"]
    flags += ["--max_seq_length", "16", "--num_samples", "64", "--output_dir", "out"]
    return [*flags, *words, "data=local", "data.path=text", *SMALL]


def test_kl_trains_the_kl(folder: Path) -> None:
    """From PCA, which it leaves behind."""
    compressor.make_compressor(
        config("thinking.objective=kl", "training.max_steps=60", "training.keep_best=true"), False
    )
    figures = json.loads(Path("run/results.json").read_text())
    assert figures["kl"] < figures["pca"]["kl"]


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
    centred = found[0].second - torch.outer(found[0].mean, found[0].mean)
    torch.testing.assert_close(centred, torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)


def test_text_is_not_counted_over_and_over(folder: Path) -> None:
    one = config("thinking.moment_tokens=1000000")
    count = int(open_bench(one).gather().moments.count)
    assert 2000 < count < 2600  # 57 documents of 41 tokens, and the rest of the last batch


def test_an_interrupted_pass_goes_on_and_has_the_bits_of_an_unbroken_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["thinking.objective=fisher", "thinking.moment_tokens=400", "training.batch_size=3"]
    expected = gathering.read_gathered(compressor.make_compressor(config(*settings, "output_dir=whole"), False))
    read, calls, add = [0], [4], gathering._add

    def failing(*args: object) -> None:
        read[0] += 1
        if read[0] == calls[0]:
            raise KeyboardInterrupt
        add(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(gathering, "_add", failing)
    monkeypatch.setattr(gathering, "KEPT_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        compressor.make_compressor(config(*settings), False)
    read[0], calls[0] = 0, 0
    found = gathering.read_gathered(compressor.make_compressor(config(*settings), False))
    assert read[0] == 9 - 3
    assert torch.equal(found.moments.outer, expected.moments.outer)
    assert torch.equal(found.metric, expected.metric)
    assert not list((folder / "run").glob(".moments*"))
    read[0], calls[0] = 0, 4
    with pytest.raises(KeyboardInterrupt):
        compressor.make_compressor(config(*settings), True)
    read[0], calls[0] = 0, 0
    compressor.make_compressor(config(*settings, "seed=7"), True)  # other text first: nothing to go on with
    assert read[0] == 9


@pytest.mark.slow
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
