"""With `data=self`, a run's original model writes the text first; from there on it is text like any other."""

import json
import logging
from pathlib import Path

import pytest
from tiny import tokenizer
from toyrun import CPU, resolved, rows, run, toy_files
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.commands import cache, pretrain, selftext, train
from wrinklefree.config.compose import load_config, read_config
from wrinklefree.core.errors import UserError
from wrinklefree.data.open import heldout_rows, training_rows
from wrinklefree.generate.selftext import write
from wrinklefree.models.load import open_tokenizer
from wrinklefree.runs import launch, self_text
from wrinklefree.runs.setup import open_run

SELF = ("data=self", "data.path=auto", "data.self_tokens=3000", "data.self_length=48")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_files(tmp_path)
    return tmp_path


def settings(folder: Path, *more: str) -> tuple[str, ...]:
    return (*SELF, f"output_root={folder / 'outputs'}", *more)


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "find_voice", lambda *args: pytest.fail("it writes again"))


def test_a_training_on_own_text_resumes_and_shares_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = resolved(folder, *settings(folder, "training.save_interval=3"))
    run(config)
    kept = Path(str(config.data.path))
    assert kept.parent.parent == folder / "outputs" / "self_text"
    saved = read_config(folder / "run" / "final" / "wrinklefree.yaml")
    assert (saved.data.source, saved.data.path) == ("self", str(kept))
    never(monkeypatch)
    other = [f"output_dir={folder / 'w1'}", "method.num_stages=1", "seed=3"]
    run(resolved(folder, *settings(folder, *other)))
    again = resolved(folder, *settings(folder, f"training.resume_from={folder / 'run' / 'checkpoints' / 'step_3'}"))
    before = rows(folder / "run")
    run(again)
    assert rows(folder / "run") == before
    texts = [json.loads(line)["text"] for line in kept.read_text().splitlines()]
    words = open_tokenizer(str(folder / "toy"))
    assert list(heldout_rows(saved.data, words).documents(None)) == texts[::20]
    assert len(list(training_rows(saved.data, words).documents(None))) == len(texts) - len(texts[::20])


def test_other_text_is_refused_at_a_resume(folder: Path) -> None:
    run(resolved(folder, *settings(folder, "training.save_interval=3")))
    more = ("data.self_seed=9", "training.resume_from=latest")
    with pytest.raises(UserError, match=r"the data position was saved with data.path="):
        run(resolved(folder, *settings(folder, *more)))


@pytest.mark.slow
def test_a_finished_stage_is_known_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="wrinklefree")
    overrides = [f"model={folder / 'toy'}", "training=stage1_subln", *settings(folder), "training.max_seq_length=16"]
    launch.run_once(overrides, force=False, processes=None)
    launch.run_once(overrides, force=False, processes=None)
    assert "stage1_subln: done, in" in caplog.text


def test_a_dry_run_says_what_would_be_written(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="wrinklefree")
    overrides = [f"model={folder / 'toy'}", "training=fairy2_w2", *settings(folder, "data.self_minutes=5")]
    train.run([*overrides, "training.total_tokens=500000000"], dry_run=True)
    assert "toy first writes 3,000 tokens in at most 5 minutes, in documents of at most 48 tokens, 0% of" in caplog.text
    assert "the run would be refused: 500,000,000 tokens are" in caplog.text
    assert not (folder / "outputs").exists()


def test_too_many_passes_over_own_text_say_what_to_do(folder: Path) -> None:
    tokens = ["training.max_steps=null", "training.total_tokens=57000"]
    with pytest.raises(
        UserError, match=r"passes over .*: let the model write more \(data.self_tokens=(\d+)\)"
    ) as refused:
        open_run(resolved(folder, *settings(folder, *tokens)), world=CPU)
    advised = str(refused.value).partition("data.self_tokens=")[2].partition(")")[0]
    open_run(resolved(folder, *settings(folder, *tokens, f"data.self_tokens={advised}")), world=CPU)


def test_the_verb_writes_rows_that_local_data_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = folder / "own.jsonl", str(folder / "toy")
    overrides = ["data.self_length=48", f"output_root={folder / 'outputs'}"]
    command = ["selftext", "-m", model, "--tokens", "3k", "-o", str(out), *overrides]
    told = CliRunner().invoke(app, command)
    assert told.exit_code == 0, told.output
    assert f"wrote {out}" in told.output
    never(monkeypatch)
    selftext.run(model, "3_000", overrides=overrides)  # kept
    run(resolved(folder, *settings(folder)))
    run(resolved(folder, f"data.path={out}", f"output_dir={folder / 'local'}"))
    assert rows(folder / "run") == rows(folder / "local")
    with pytest.raises(UserError, match="exists already"):
        selftext.run(model, "3k", out=out, overrides=[])


@pytest.mark.parametrize(
    ("tokens", "out", "more", "message"),
    [
        ("many", None, [], "--tokens many: not a number"),
        ("0", None, [], "--tokens 0: not a number of tokens"),
        ("1k", "own.txt", [], "give it the suffix .jsonl"),
        ("1k", "none/own.jsonl", [], "there is no folder none"),
        ("1k", None, ["training.lr=1"], "training.lr=1: wf selftext takes data.self_, output_root"),
    ],
)
def test_the_verb_refuses_mistakes_before_it_loads(tokens: str, out: str | None, more: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        selftext.run("tiny", tokens, out=None if out is None else Path(out), overrides=more)


def test_a_cache_of_the_models_answers_to_its_own_text(folder: Path) -> None:
    sizes = {"length": 16, "topk": 4, "negatives": 0, "num_train": 40, "num_heldout": 4, "shard_size": 16}
    own = [*SELF]
    cache.run(folder / "cache", model=str(folder / "toy"), overrides=own, **sizes)
    assert (folder / "cache" / "manifest.json").is_file()


def test_a_model_without_weights_has_no_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "build_model", lambda config: pytest.fail("the model was built"))
    with pytest.raises(UserError, match="data=self: there is no text yet"):
        pretrain.run(["model=tiny", "data=self", f"output_dir={folder / 'p'}", "training.max_steps=1"], force=False)


def test_settings_of_own_text_are_refused_for_other_data() -> None:
    config = load_config(["data=stdlib", "data.self_tokens=5"])
    with pytest.raises(UserError, match=r"data\.self_tokens=5 has no effect with data.source=stdlib"):
        training_rows(config.data, tokenizer())


def test_a_run_that_goes_on_keeps_its_text_although_it_has_other_minutes_now(folder: Path) -> None:
    config = resolved(folder, *settings(folder, "data.self_minutes=0.0001", "training.save_interval=3"))
    run(config)
    step = folder / "run" / "checkpoints" / "step_3"
    more = resolved(folder, *settings(folder, "data.self_minutes=9", f"training.resume_from={step}"))
    with open_run(more) as going_on:
        assert going_on.config.data.path == config.data.path
    Path(str(config.data.path)).unlink()
    more.data.path = "auto"
    with open_run(more) as going_on:
        assert going_on.config.data.path not in ("auto", config.data.path)


def test_writing_takes_a_share_of_the_minutes(folder: Path) -> None:
    model = [f"model={folder / 'toy'}", "training=fairy2_w2", "data=self"]
    alone = load_config(model)
    assert self_text.limit(alone, None) is None
    assert self_text.limit(alone, 40.0) == pytest.approx(6)
    assert self_text.limit(load_config([*model, "data.self_minutes=3"]), 40.0) == 3
