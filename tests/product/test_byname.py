"""Found by name: one of each kind, written from the documents' own code into an empty folder, is chosen and works."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, blocks, put
from tiny import tokenizer
from toyrun import resolved, rows, run, toy_files

from wrinklefree.commands import export as export_command
from wrinklefree.commands import methods as methods_command
from wrinklefree.config.schema import Config, DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, KINDS, SCHEDULES, find_named, names
from wrinklefree.data.open import training_stream
from wrinklefree.export.flags import formats

SHORT = ["training.max_steps=3", "training.scheduler.warmup_ratio=0"]


PAGE = blocks("CONTRIBUTING.md")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder where the user stands, beside a toy model and its text."""
    monkeypatch.chdir(tmp_path)
    toy_files(tmp_path)
    return tmp_path


def trained(here: Path, path: str, *settings: str) -> Config:
    """The config of a short run with the page's file `path`."""
    put(here, path, PAGE[path])
    config = resolved(here, *SHORT, *settings)
    run(config)
    return config


def test_a_schedule_is_one_file(here: Path) -> None:
    trained(here, "schedules/steps.py", "training.scheduler.name=steps")
    assert [float(row["lr"]) for row in rows(here / "run")] == pytest.approx([1e-3, 5e-4, 5e-4])


def test_an_objective_is_one_file(here: Path) -> None:
    trained(here, "objectives/focal.py", "training.objective=focal")
    for row in rows(here / "run"):
        assert 0 < float(row["train_p"]) < 1
        assert 0 < float(row["train_loss"]) < float(row["train_ce"])


def test_a_distillation_preset_is_one_yaml(here: Path) -> None:
    config = trained(here, "configs/distillation/sharp.yaml", "distillation=sharp")
    assert (config.distillation.name, config.distillation.temperature) == ("sharp", 0.5)
    for row in rows(here / "run"):
        assert float(row["train_loss"]) == pytest.approx(float(row["train_kl"]), rel=1e-5)


def test_an_export_format_is_one_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(here, "export_formats/npz.py")
    export_command.run(here / "run", "npz", None, False)
    with np.load(here / "run" / "npz" / "weights.npz") as weights:
        assert weights["model.layers.0.mlp.down_proj"].shape == (64, 96)
    assert "next: numpy.load(" in capsys.readouterr().out


def test_a_data_format_is_one_file(here: Path) -> None:
    put(here, "data_formats/qa.py", PAGE["data_formats/qa.py"])
    lines = [json.dumps({"question": f"w{n}", "answer": f"w{n + 1}"}) for n in range(40)]
    (here / "rows.jsonl").write_text("\n".join(lines))
    config = DataConfig(source="local", path="rows.jsonl", format="qa", enable_thinking="none")
    batch = next(iter(training_stream(config, tokenizer(), batch_size=1, length=16, seed=0)))
    question, answer = batch["input_ids"][0, :2].tolist()
    assert answer == question + 1


def test_a_name_of_the_package_is_not_shadowed(here: Path) -> None:
    put(here, "schedules/wsd.py", PAGE["schedules/steps.py"])
    with pytest.raises(UserError, match=r"schedules/wsd.py: the package has a schedule 'wsd' already"):
        names(SCHEDULES)
    put(here, "configs/distillation/logits.yaml", "name: logits")
    with pytest.raises(UserError, match=r"logits.yaml: the package has a distillation=logits already"):
        resolved(here)


def test_files_of_another_kind_do_no_harm(here: Path) -> None:
    """A folder of this name may be another project's; its files are not run, and its names say why they are none."""
    put(here, "schedules/crash.py", "raise SystemExit")
    put(here, "schedules/python2.py", "print 'x'")
    assert "crash" not in names(SCHEDULES)
    with pytest.raises(UserError, match=r"schedules/crash.py: defines no `rate`, so it is no schedule"):
        find_named(SCHEDULES, "crash")
    with pytest.raises(UserError, match=r"schedules/python2.py, line 1: "):
        find_named(SCHEDULES, "python2")


def test_a_member_may_be_assigned(here: Path) -> None:
    put(here, "schedules/half.py", "rate = lambda config, progress: 0.5\n")
    assert find_named(SCHEDULES, "half")(None, 0.0) == 0.5


def test_another_folder_has_files_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("a", "b"):
        put(here, f"{folder}/data_formats/one.py", f"def document(row, reading, where):\n    return {folder!r}\n")
        monkeypatch.chdir(here / folder)
        assert find_named(DATA_FORMATS, "one")({}, None, "") == folder


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("training.objective=cached_k", "did you mean 'cached_kd'"),
        ("training.scheduler.name=cosin", "did you mean 'cosine'"),
        ("data.format=dolli", "did you mean 'dolly'"),
        ("distillation.name=logit", "did you mean 'logits'"),
    ],
)
def test_a_wrong_name_is_told_the_closest_and_all(here: Path, setting: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(setting)}: .*{said}.*available: ") as error:
        resolved(here, setting)
    assert len(str(error.value).splitlines()) == 1


def test_a_run_is_read_where_its_files_are_not(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(here, "schedules/steps.py", "training.scheduler.name=steps")
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    export_command.run(here / "run", "dense", None, False)
    assert (here / "run" / "dense" / "config.json").is_file()


def test_everything_is_listed_in_80_columns(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(here, "schedules/steps.py", PAGE["schedules/steps.py"])
    methods_command.run()
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    listed = re.findall(r"^  (\S+)", out, re.MULTILINE)
    assert {"steps", *formats()} <= set(listed)
    assert len(listed) == sum(len(names(kind)) for kind in KINDS)


def test_the_page_shows_the_kinds_as_the_code_has_them() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind in KINDS:
        folder = kind.package.removeprefix("wrinklefree.").replace(".", "/")
        row = f"| {kind.word} | `{folder}/` | `{kind.folder}/` | `{kind.member}` | `{kind.setting}` |"
        assert row in text


def cells(page: str, row: str) -> set[str]:
    """Words in code in the lines of a page that match."""
    lines = [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if re.match(row, line)]
    assert lines
    return set(re.findall(r"`([\w-]+)`", " ".join(lines)))


LISTS: dict[str, Callable[[], bool]] = {
    "export formats": lambda: cells("docs/formats.md", r"\| \| `hf` \|") == set(formats()),
    "data formats": lambda: set(names(DATA_FORMATS)) <= cells("docs/configuration.md", r"\| `data.format` \|"),
    "schedules": lambda: set(names(SCHEDULES)) <= cells("docs/configuration.md", r"\| `training.scheduler.name` \|"),
    "columns": lambda: set(names(DATA_FORMATS)) <= cells("docs/kd-cache.md", r"\| `\w+` \|"),
}


@pytest.mark.parametrize("what", LISTS)
def test_lists_in_the_documents_are_whole(what: str) -> None:
    assert LISTS[what]()


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*/test_*.py")), ids=lambda path: path.name)
def test_every_file_of_tests_says_what_it_checks(path: Path) -> None:
    """CONTRIBUTING sends readers to these lines."""
    assert re.match(r'"""\w.+\.', path.read_text(encoding="utf-8"))
