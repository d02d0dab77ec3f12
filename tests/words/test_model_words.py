"""Every verb that takes a model takes it as `-m NAME`, as `model=NAME` and in its own way, and only one of them."""

import pytest
import typer.main
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.words.models import UsageError, as_it_takes_it

COMMANDS = typer.main.get_command(app).commands
WITHOUT = {"plot", "methods", "doctor", "runs", "logs", "cancel", "wandb-status"}  # verbs that take no model
THINKING = [f"trm {verb}" for verb in COMMANDS["trm"].commands]
WITH = [verb for verb in COMMANDS if verb not in WITHOUT | {"trm"}] + THINKING


def command(verb: str) -> typer.core.TyperCommand:
    first, _, second = verb.partition(" ")
    return COMMANDS[first].commands[second] if second else COMMANDS[first]


def models(verb: str, words: list[str]) -> list[str]:
    """The models that a verb's own parser finds in the words."""
    own = {"cache": ["--out", "x"], "push": ["me/x"]}.get(verb, [])
    parsed = command(verb).make_context(verb, as_it_takes_it(command(verb), [*own, *words])).params
    named = [word.partition("=")[2] for word in parsed.get("overrides") or () if word.startswith("model=")]
    found = [parsed[name] for name in ("model", "path", "run") if parsed.get(name)]
    return [str(name) for name in [*named, *found, *parsed.get("paths", ())]]


@pytest.mark.parametrize("verb", WITH)
@pytest.mark.parametrize("words", [["-m", "a/b"], ["--model", "a/b"], ["--model=a/b"], ["model=a/b"]], ids=" ".join)
def test_every_verb_takes_its_model_in_every_form(verb: str, words: list[str]) -> None:
    assert models(verb, words) == ["a/b"]


@pytest.mark.parametrize("verb", WITH)
def test_two_forms_that_agree_are_one_model(verb: str) -> None:
    assert models(verb, ["-m", "a/b", "model=a/b"]) == ["a/b"]


@pytest.mark.parametrize("verb", [verb for verb in WITH if verb != "serve"])
def test_two_forms_that_differ_are_refused(verb: str) -> None:
    with pytest.raises(UsageError, match="-m a and model=b: which model"):
        models(verb, ["-m", "a", "model=b"])


@pytest.mark.parametrize("verb", ["eval", "generate", "export", "push"])
def test_a_model_in_its_place_and_another_are_refused(verb: str) -> None:
    assert models(verb, ["a", "-m", "a"]) == ["a"]
    with pytest.raises(UsageError, match="a and -m b: which model"):
        models(verb, ["a", "-m", "b"])


def test_two_models_are_one_line() -> None:
    result = CliRunner().invoke(app, ["eval", "outputs/a", "-m", "outputs/b"])
    said = "Error: outputs/a and -m outputs/b: which model? Give one of them\n"
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", said)


def test_a_server_takes_several_models_in_any_form() -> None:
    assert models("serve", ["-m", "a", "model=b", "c", "--port", "80"]) == ["a", "b", "c"]
    assert models("serve", ["a", "-m", "a"]) == ["a"]


@pytest.mark.parametrize(
    ("verb", "words", "expected"),
    [
        ("fairy2", "model=tiny --mode w1", "--model tiny --mode w1"),
        ("train", "-m tiny training=fairy2_w2", "model=tiny training=fairy2_w2"),
        ("train", "--nproc 2 --model=tiny", "--nproc 2 model=tiny"),
        ("generate", "-m tiny --prompt model=x", "tiny --prompt model=x"),
        ("generate", "--chat model=tiny --prompt", "tiny --chat --prompt"),  # an option without its value stays last
        ("eval", "model=a/b", "a/b"),
        ("push", "-m outputs/a me/x", "me/x outputs/a"),
        ("plan", "model=tiny --gpus 2", "--model tiny --gpus 2"),
        ("runs", "-m elsewhere", "-m elsewhere"),
        ("methods", "", ""),
    ],
)
def test_words_around_a_model_stay(verb: str, words: str, expected: str) -> None:
    assert as_it_takes_it(COMMANDS[verb], words.split()) == expected.split()


@pytest.mark.parametrize("words", [["--cloud", "model=tiny"], ["--cloud", "-m", "tiny"]])
def test_a_cloud_without_a_name_leaves_the_model(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("wrinklefree.commands.train.start", lambda chain, *rest: asked.append(chain[0]))
    assert CliRunner().invoke(app, ["train", *words, "--dry-run"]).exit_code == 0
    assert asked == [["model=tiny"]]
