"""Names and paths of a user are taken letter by letter, from every place that a setting can come from."""

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from typer.testing import CliRunner

from wrinklefree.cli import app
from wrinklefree.config.compose import config_yaml, load_config, read_config
from wrinklefree.config.schema import Config
from wrinklefree.config.values import parse_value, quoted, setting
from wrinklefree.core.errors import UserError

NAMES = [
    "model (1)",
    "mödel",
    "it's",
    "a#b",
    "llama,3",
    "1e5",
    "m/1",
    "true",
    "[x]",
    "{y}",
    'say "hi"',
    "a=b",
    "~x",
    "a: b",
]
NAMES += [
    "back\\slash",
    "back\\'slash",
    "ends\\",
    "0x1F",
    "2020-01-01",
    "1_000",
    "no",
    "null.",
    " x ",
    "a\tb",
    "$HOME",
    "*",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_a_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config([f"model={name}", "training=fairy2_w2"])
    assert (config.model.pretrained, config.model.name) == (name, Path(name).name)
    assert config.output_dir == f"outputs/fairy2_{Path(name).name}_w2"


TEXTS = ["output_root", "experiment", "output_dir", "data.path", "data.subset", "data.split", "distillation.teacher"]


@pytest.mark.parametrize("text", [*NAMES, "train[:10%]", "gs://b/x=1/step_5", "", "'", "a,'b'"])
def test_a_text_is_taken_letter_by_letter(text: str, tmp_path: Path) -> None:
    config = load_config(["data=local", *(f"{key}={text}" for key in TEXTS)])
    for key in TEXTS:
        section, _, name = key.rpartition(".")
        assert vars(vars(config)[section] if section else config)[name] == text
    (tmp_path / "wrinklefree.yaml").write_text(config_yaml(config), encoding="utf-8")
    assert read_config(tmp_path / "wrinklefree.yaml") == config


def test_any_text_is_taken_letter_by_letter() -> None:
    draw = random.Random(0)
    letters = " \t'\"\\,[](){}=:#$~*&|<>!?@%^+-/.0123456789aeEnulNxtrufls_é🙂"
    for _ in range(2000):
        text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
        assert parse_value("k", text, {"k": str}) == text
        assert parse_value("k", setting("k", [text, "b"])[2:], {"k": list[str]}) == [text, "b"]
        assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


@pytest.mark.parametrize("name", NAMES)
def test_a_working_directory_of_any_name_has_its_configs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / name / "configs" / "model"
    mine.mkdir(parents=True)
    (mine / "my model (2).yaml").write_text("name: mine\npretrained: /models/mine\n")
    monkeypatch.chdir(tmp_path / name)
    assert load_config(["model=my model (2)"]).model.pretrained == "/models/mine"


@pytest.mark.parametrize("name", NAMES)
def test_local_yaml_takes_names_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.yaml").write_text(json.dumps({"output_root": name, "model": name}))
    config = load_config([])
    assert (config.output_root, config.model.pretrained) == (name, name)


VERBS = [
    "fairy2 -m",
    "bitdistill -m",
    "anemll -m",
    "cache -o out -m",
    "trm compressor",
    "train",
    "generate -p x",
    "eval",
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["model (1)", "it's", "1e5", "llama,3", "[x]", "true"])
def test_every_command_takes_a_name_as_it_is(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder holds no model, and the error names it."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    argument = f"model={name}" if verb in ("trm compressor", "train") else name
    result = CliRunner().invoke(app, [*verb.split(), argument])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {name}: no config.json"), result.stderr


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a${model.name}", "[${seed}]"])
def test_an_interpolation_in_a_value_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for override in (f"output_dir={text}", f"training.freeze_names=[{text}]", f"training.lr={text}"):
        with pytest.raises(UserError, match="write the value itself"):
            load_config([override])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.yaml").write_text(f"output_dir: '{text}'\n")
    with pytest.raises(UserError, match="write the value itself"):
        load_config([])


def test_values_that_are_no_text_have_their_types() -> None:
    config = load_config(
        [
            "training.optimizer.betas=[0.9,0.95]",
            "training.optimizer.lr=1e-5",
            "training.total_tokens=1e6",
            "training.freeze_names=[embed_tokens, 'a,b',\"c\", it's]",
            "training.start_from=[a,b]",
            "training.max_steps=null",
            "training.keep_best=true",
            "training.resume_from=null",
            "distillation.hidden.layer_weights=[1,2.5]",
            "method.exclude_names=[]",
            "+seed=3",
        ]
    )
    t = config.training
    assert (t.optimizer.betas, t.optimizer.lr, t.total_tokens) == ((0.9, 0.95), 1e-5, 1_000_000)
    assert (t.freeze_names, t.start_from) == (["embed_tokens", "a,b", "c", "it's"], ["a", "b"])
    assert (t.max_steps, t.keep_best, t.resume_from, config.seed) == (None, True, None, 3)
    assert config.distillation.hidden.layer_weights == [1, 2.5]
    assert config.method.exclude_names == []
    assert load_config(["data=hub", "data.path=x", "data.enable_thinking=both"]).data.enable_thinking == "both"
    assert load_config(["data=hub", "data.path=x", "data.enable_thinking=true"]).data.enable_thinking is True


@pytest.mark.parametrize("value", ["1,2", "it's", "(", "{", "[1", "int(3", "${", "'", "\\"])
def test_a_number_that_is_none_is_named(value: str) -> None:
    with pytest.raises(UserError, match=r"training\.(batch_size|batch_size=\$)"):
        load_config([f"training.batch_size={value}"])


@pytest.mark.parametrize(
    "key", ["[", ".", "a..b", "training.", "", "a[0]", "~seed", "model@x", "training.freeze_names.0"]
)
def test_a_key_that_is_none_is_named(key: str) -> None:
    with pytest.raises(UserError, match=r"is not the path of a setting|is not key=value"):
        load_config([f"{key}=1"])


@pytest.mark.parametrize("value", [None, True, 3, 0.25, "a", "null and void", ["a", "it's, so"], (0.5, 1)])
def test_a_setting_is_read_back(value: Any) -> None:
    kinds = {"k": {type(None): str | None, str: str | None, list: list[str]}.get(type(value), Any)}
    read = parse_value("k", setting("k", value).partition("=")[2], kinds)
    assert read == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize("text", NAMES)
def test_hydras_grammar_reads_what_is_quoted_for_it(text: str) -> None:
    assert OverridesParser.create().parse_override(f"key={quoted(text)}").value() == text


def test_the_shell_and_typer_hand_on_what_they_get() -> None:
    words = shlex.split(f"wf config model=tiny {shlex.quote(setting('output_dir', NAMES[0]))}")
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0
    assert f"output_dir: {NAMES[0]}" in result.stdout
    assert isinstance(load_config(words[2:]), Config)
