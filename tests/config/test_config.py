"""Every shipped YAML composes, every key is read by code, and mistakes come all at once, with their full path."""

import ast
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

import wrinklefree
from wrinklefree.config.compose import config_yaml, load_config, read_config
from wrinklefree.config.groups import CONFIGS, options
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import available, find

SRC = Path(wrinklefree.__file__).parent
# A recipe of `wf trm` sets what only its own training has.
RECIPES = {"recipe=chains_trm_compressor": "training=trm_compressor", "recipe=chains_trm_pairs": "training=trm_pairs"}
RECIPES |= {"recipe=chains_trm_recursion": "training=trm_recursion"}
REQUIRED = {"model=pretrained": ["model.name=x", "model.pretrained=x"]} | {name: [own] for name, own in RECIPES.items()}


def groups() -> dict[str, list[str]]:
    """Every folder of configs with its YAML files."""
    return {folder.name: options(folder.name) for folder in sorted(CONFIGS.iterdir()) if any(folder.glob("*.yaml"))}


def choices() -> Iterator[list[str]]:
    """Every YAML alone."""
    return ([f"{group}={name}"] for group, names in groups().items() for name in names)


def pairs() -> Iterator[Any]:
    """Every model with every training: these two are what a run is put together from. Each of both is quick once."""
    models, trainings = options("model"), options("training")
    for i, j in itertools.product(range(len(models)), range(len(trainings))):
        quick = i % len(trainings) == j % len(models)
        choice = [f"model={models[i]}", f"training={trainings[j]}"]
        yield pytest.param(choice, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("choice", [*choices(), *pairs()], ids=" ".join)
def test_every_yaml_composes_and_every_model_with_every_training(choice: list[str]) -> None:
    config = load_config(list(dict.fromkeys([*choice, *(more for c in choice for more in REQUIRED.get(c, []))])))
    assert isinstance(config, Config)
    assert "???" not in config_yaml(config)


def test_choices_cover_every_yaml() -> None:
    named = {c.replace("=", "/") for choice in choices() for c in choice}
    shipped = {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.glob("*/*.yaml")}
    assert named == shipped
    assert {p.stem for p in CONFIGS.glob("*.yaml")} == {"config", "pretrain"}
    assert load_config([], "pretrain").training.stage == "pretrain"


def sections(cls: type, prefix: str = "") -> Iterator[tuple[type, str]]:
    """Every config dataclass below `cls`, with the path of its keys."""
    yield cls, prefix
    for f in dataclasses.fields(cls):
        for part in (f.type, *get_args(f.type)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from sections(part, f"{prefix}{f.name}.")


def fields() -> dict[str, str]:
    """The full path of every key of the schema and of the methods -> its name."""
    roots = [(Config, ""), *((find(name), "method.") for name in available())]
    found = [s for cls, prefix in roots for s in sections(cls, prefix)]
    return {f"{prefix}{f.name}": f.name for cls, prefix in found for f in dataclasses.fields(cls)}


def attributes_read() -> set[str]:
    """Names that any code outside of `config/` takes from an object, or from a method's settings in a packed folder."""
    files = [path for path in SRC.rglob("*.py") if SRC / "config" not in path.parents]
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    keys = {
        ast.literal_eval(n.slice) for n in nodes if isinstance(n, ast.Subscript) and ast.unparse(n.value) == "settings"
    }
    return keys | {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}


READ = attributes_read()
FIELDS = fields()


@pytest.mark.parametrize("path", FIELDS)
def test_every_key_is_read(path: str) -> None:
    if path == "training.lr":
        assert "lr: ${training.lr}" in (CONFIGS / "config.yaml").read_text()
    elif path == "training.stage":
        assert "${training.stage}" in (CONFIGS / "config.yaml").read_text()
    elif path.startswith("model.quantization"):
        assert "config.model.quantization" in (SRC / "config" / "check.py").read_text()
    else:
        assert FIELDS[path] in READ


def keys(values: Any, prefix: str) -> Iterator[str]:
    """Full paths of the leaves of a YAML file."""
    for key, value in values.items():
        if key != "defaults":
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]


@pytest.mark.parametrize("file", [p.relative_to(CONFIGS).as_posix() for p in sorted(CONFIGS.rglob("*.yaml"))])
def test_every_key_of_every_yaml_is_a_field(file: str) -> None:
    text = (CONFIGS / file).read_text()
    is_global = "/" not in file or "@package _global_" in text
    found = list(keys(yaml.safe_load(text), "" if is_global else f"{file.partition('/')[0]}."))
    assert found
    assert set(found) <= FIELDS.keys()


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_yaml_says_what_it_is(file: Path) -> None:
    assert file.read_text().startswith("# ")


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(UserError) as refused:
        load_config(list(overrides))
    return str(refused.value).splitlines()


def test_all_mistakes_come_together_with_their_paths() -> None:
    found = mistakes(
        "training.max_stepz=10",
        "training.optimizer.lrr=1e-4",
        "training.batch_size=many",
        "training.scheduler.warmup_ratio=2",
        "training.precision=fp8",
        "method.num_stages=9",
        "method.num_stagez=2",
        "nonsense=1",
    )
    starts = [line.partition(":")[0] for line in found]
    assert sorted(starts) == sorted(
        [
            "training.max_stepz",
            "training.optimizer.lrr",
            "training.batch_size",
            "training.scheduler.warmup_ratio",
            "training.precision",
            "method.num_stages",
            "method.num_stagez",
            "nonsense",
        ]
    )
    assert "training.max_stepz: unknown key (did you mean 'training.max_steps'?)" in found
    assert "training.optimizer.lrr: unknown key (did you mean 'training.optimizer.lr'?)" in found
    assert "method.num_stagez: unknown key (did you mean 'method.num_stages'?)" in found
    assert any("got 'many'" in line for line in found)


def test_a_key_in_the_wrong_place_is_pointed_to_its_own() -> None:
    assert mistakes("warmup_ratio=0.1") == [
        "warmup_ratio: unknown key (did you mean 'training.scheduler.warmup_ratio'?)"
    ]


def test_a_missing_value_is_named() -> None:
    assert mistakes("model=pretrained", "model.pretrained=x") == ["model.name: a value is required"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training=fairy2_w3", "training=fairy2_w3: no such option (did you mean 'fairy2_w"),
        ("data=stdlb", "data=stdlb: no such option (did you mean 'stdlib'?); available: "),
        ("distillation=logit", "(did you mean 'logits'?)"),
        ("training.max_steps", "is not key=value"),
    ],
)
def test_a_wrong_choice_is_one_line(override: str, message: str) -> None:
    (line,) = mistakes(override)
    assert message in line


def test_settings_that_exclude_each_other_are_one_line() -> None:
    (line,) = mistakes("method.scale_mode=mean", "method.scale_granularity=row")
    assert line.startswith("method")
    assert "scale_mode=mean" in line


def test_values_come_with_their_types() -> None:
    config = load_config(
        ["training.optimizer.lr=5e-5", "training.total_tokens=100_000_000", "training.freeze_names=[a,b]"]
    )
    assert config.training.optimizer.lr == 5e-5
    assert config.training.total_tokens == 100_000_000
    assert config.training.freeze_names == ["a", "b"]
    assert config.training.optimizer.betas == (0.9, 0.95)
    assert load_config(["training.lr=5e-5"]).training.optimizer.lr == 5e-5
    assert load_config(["training.resume_from=gs://b/x=1/step_5"]).training.resume_from == "gs://b/x=1/step_5"


def test_mode_sets_stages_and_folder() -> None:
    for mode, stages in (("w1", 1), ("w2", 2)):
        config = load_config(["model=smollm2_135m", f"training=fairy2_{mode}"])
        assert config.method.num_stages == stages
        assert config.output_dir == f"outputs/fairy2_smollm2_135m_{mode}"


@pytest.mark.parametrize("choice", [["training=fairy2_w1"], ["data=local", "data.path=a: b"], ["distillation=none"]])
def test_yaml_comes_back_the_same(tmp_path: Path, choice: list[str]) -> None:
    config = load_config([*choice, "training.freeze_names=[layers.0]", "training.lr=1e-5"])
    (tmp_path / "wrinklefree.yaml").write_text(config_yaml(config))
    assert read_config(tmp_path / "wrinklefree.yaml") == config
    assert type(read_config(tmp_path / "wrinklefree.yaml").method) is type(config.method)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "model: 3", "\x00"])
def test_a_foreign_yaml_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrinklefree.yaml").write_text(text)
    with pytest.raises(UserError):
        read_config(tmp_path / "wrinklefree.yaml")


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "configs" / "model"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("name: mine\npretrained: /models/mine\n")
    assert "no such option" in mistakes("model=mine")[0]
    monkeypatch.chdir(tmp_path)
    assert load_config(["model=mine"]).model.pretrained == "/models/mine"
    assert load_config(["model=tiny"]).model.name == "tiny"
