"""A word that does not exist is answered with one that does."""

import pytest
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.words.hints import ELSEWHERE


def said(*words: str) -> str:
    """The last line that `wf` says about a mistake."""
    result = CliRunner().invoke(app, list(words))
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --nprocs 2", "Error: No such option: --nprocs (did you mean '--nproc'?)"),
        ("trm compressor --swep 2", "Error: No such option: --swep (did you mean '--sweep'?)"),
        ("train --zzzzzz", "Error: No such option: --zzzzzz"),
        ("aneml", "Error: No such command 'aneml' (did you mean 'anemll'?)"),
        ("trm compresor", "Error: No such command 'compresor' (did you mean 'compressor'?)"),
        ("zzzzzz", "Error: No such command 'zzzzzz'"),
    ],
)
def test_the_closest_word_alone_is_suggested(words: str, message: str) -> None:
    assert said(*words.split()) == message


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("quantize", ["wf fairy2", "wf methods"]),
        ("chat", ["wf generate", "-i"]),
        ("list", ["wf runs", "wf methods"]),
        ("info", ["wf doctor"]),
        ("help", ["wf --help"]),
        ("version", ["wf --version"]),
        ("finetune", ["wf train"]),
        ("benchmark", ["wf eval", "wf compare"]),
    ],
)
def test_verbs_of_other_programs_lead_to_ours(verb: str, words: list[str]) -> None:
    line = said(verb, "-m", "tiny")
    assert all(word in line for word in words)
    assert len(line) <= 110


def test_no_hint_hides_a_verb() -> None:
    assert not [verb for verb in ELSEWHERE if CliRunner().invoke(app, [verb, "--help"]).exit_code == 0]


@pytest.mark.parametrize("verb", ["fairy2", "train", "plan", "compare", "trm compressor"])
def test_letters_that_changed_places_are_found(verb: str) -> None:
    assert "model=tyni: no such option (did you mean 'tiny'?)" in said(*verb.split(), "-m", "tyni")


@pytest.mark.parametrize("verb", ["eval", "generate --prompt x", "serve"])
def test_a_model_that_is_not_there_may_be_a_config(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "tyni: no such folder here (did you mean 'tiny'?)" in said(*verb.split(), "-m", "tyni")
