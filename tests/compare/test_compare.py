"""Methods are compared on equal terms, rows are kept, and the page needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny import family
from toyrun import overrides, resolved, toy_files

from wrinklefree.commands import compare
from wrinklefree.compare import page, quality, references
from wrinklefree.compare.charts import Axis, Point, scatter
from wrinklefree.compare.entries import entries
from wrinklefree.compare.quality import common
from wrinklefree.compare.rows import Group, Row, Store, dominated, grouped
from wrinklefree.core.errors import UserError
from wrinklefree.runs import launch
from wrinklefree.runs.setup import open_run


def row(method: str = "a", **values: object) -> Row:
    figures = {"bits": 2.0, "bits_per_parameter": 3.0, "coverage": 1.0, "bytes": 100, "ppl": 20.0, "kl": 0.5}
    figures |= {"top1": 0.5, "distinct": 0.5, "agreement": 0.5}
    return Row(method=method, **(figures | values))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Settings of toy runs; the model is `toy`."""
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = ("model=", "training=", "output_dir=", "training.max_steps=")
    return [each for each in overrides(tmp_path) if not each.startswith(own)]


def test_methods_are_compared_on_equal_terms_and_kept(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"methods": "fairy2_w1,bitdistill", "references_named": "int4,rtn_2bit", "seeds": 2, "steps": 2}
    compare.run("toy", **chosen, overrides=settings)
    out = Path("outputs/compare_toy")
    rows = json.loads((out / compare.FIGURES).read_text())["rows"]
    found = {(each["method"], each["seed"]): each for each in rows}
    ours = [(name, seed) for name in ("fairy2_w1", "bitdistill") for seed in (42, 43)]
    assert set(found) == {("original", None), ("int4", None), ("rtn_2bit", None), *ours}
    assert len({each["measured_on"] for each in rows}) == 1
    assert found["original", None]["kl"] == 0
    assert found["original", None]["agreement"] == 1
    assert 0 < found["int4", None]["kl"] < found["rtn_2bit", None]["kl"]
    for name in ours:
        packed = out / "runs" / f"{name[0]}-{name[1]}" / "packed"
        assert found[name]["bytes"] == sum(file.stat().st_size for file in packed.glob("*.safetensors"))
        assert found[name]["coverage"] == 1
        assert len(found[name]["curve"]) == 2
    assert "± " in (out / compare.TABLE).read_text()
    assert "fairy2_w1" in capsys.readouterr().out

    # The same command has nothing left to do.
    monkeypatch.setattr(launch, "run_stage", lambda *args, **more: pytest.fail("it trains again"))
    monkeypatch.setattr(compare, "trained", lambda *args: pytest.fail("it measures again"))
    monkeypatch.setattr(references, "reference", lambda *args: pytest.fail("it measures again"))
    compare.run("toy", **chosen, overrides=settings)
    assert json.loads((out / compare.FIGURES).read_text())["rows"] == rows


def test_a_comparison_can_be_all_that_standard_output_gets(
    settings: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    compare.run("toy", methods="fairy2_w1", references_named="none", steps=1, as_json=True, overrides=settings)
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads(Path("outputs/compare_toy", compare.FIGURES).read_text())
    assert [each["method"] for each in json.loads(out)["rows"]] == ["original", "fairy2_w1"]
    assert "held-out perplexity" not in err  # the report of the run is in its own file
    assert "held-out perplexity" in Path("outputs/compare_toy", compare.LOGS, "fairy2_w1-42.log").read_text()
    assert "next: open" in err


def test_runs_train_in_as_many_processes_as_are_asked_for(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def stopped(chain: list[list[str]], *more: object) -> None:
        asked.append(more)
        raise UserError("stop")

    monkeypatch.setattr(launch, "run_chain", stopped)
    with pytest.raises(UserError, match="stop"):
        compare.run("toy", methods="fairy2_w1", references_named="none", steps=1, processes=2, overrides=settings)
    assert asked == [(False, 2, None)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dry_run": True, "as_json": True}, "--json: has no effect with --dry-run"),
        ({"methods": "fairy2_w1,fairy3"}, "--methods fairy3: no such method"),
        ({"methods": "fairy2_w1,fairy2_w1"}, "named twice"),
        ({"methods": "full_precision"}, "quantizes nothing"),
        ({"methods": "stage2_pretrain"}, "is a stage that needs others"),
        ({"references_named": "int3"}, "--references int3"),
        ({"steps": 2, "budget": "2h"}, "give one of them"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    options: dict[str, object], said: str, settings: list[str]
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        compare.run("toy", overrides=settings, **options)
    assert not Path("outputs").exists()


def test_all_methods_come_before_the_second_seed(settings: list[str]) -> None:
    found = entries("toy", ["fairy2_w1", "bitdistill"], 2, 2, settings, Path("out"))
    assert [entry.name for entry in found] == ["fairy2_w1-42", "bitdistill-42", "fairy2_w1-43", "bitdistill-43"]
    configs = [entry.config() for entry in found]
    assert {config.training.max_steps for config in configs} == {2}
    assert {config.distillation.name for config in configs} == {"logits"}
    assert {config.export.head_bits for config in configs} == {8}


def test_a_row_of_another_test_run_or_version_is_measured_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = store.put(replace(row(), measured_on="x", source="y"))
    assert store.get("a", "x", "y") == kept
    assert store.get("a", "x", "z") is None
    assert store.get("a", "w", "y") is None
    (tmp_path / "a.json").write_text(json.dumps({"method": "a"}))
    assert store.get("a", "x", "y") is None


def test_one_is_dominated_if_another_is_no_larger_and_no_worse() -> None:
    rows = [row("small", bytes=50, kl=2.0), row("good", kl=0.1), row("bad", kl=0.3), row("twin", kl=0.1)]
    assert dominated(grouped(rows), "kl") == {"bad"}


def test_seeds_are_one_line_with_mean_and_spread() -> None:
    [group] = grouped([row(seed=1, ppl=20.0), row(seed=2, ppl=22.0)])
    assert page.cells(group)[5] == "21.00 ± 1.4"
    assert group.spread("kl") == 0


def test_common_beginnings() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 3]) == 2
    assert common([], [1]) == 0


class _Parser(HTMLParser):
    """Collects tags, and attributes that would fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]


def test_the_page_stands_alone_and_escapes_what_models_write() -> None:
    evil = "<script>alert(1)</script>"
    rows = [row("original", samples={evil: "</table>"}), row("<b>x", seed=1, curve=[(0.0, 1.0), (1.0, 0.5)], bytes=50)]
    text = page.html("A <title>", ["fact & fact"], grouped(rows))
    parser = _Parser()
    parser.feed(text)
    assert parser.fetched == []
    assert "script" not in parser.tags
    assert "b" in parser.tags  # of a caption, not of a name
    assert evil not in text
    assert text.count("</table>") == 2
    assert parser.tags.count("svg") == 3
    assert "http" not in text


def test_points_stay_inside_of_their_chart() -> None:
    points = [Point(f"p{i}", 50 + i, 0.1 * 3**i, spread=0.05, grey=i % 2 == 0) for i in range(6)]
    svg = scatter(points, "x", "y", "t")
    places = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    assert len(places) == 6
    assert all(0 < x < 640 and 0 < y < 360 for x, y in places)
    assert [y for _, y in sorted(places)] == sorted((y for _, y in places), reverse=True)


@pytest.mark.parametrize(("low", "high", "is_log"), [(0.2, 0.9, False), (50, 60, False), (0.01, 300, True)])
def test_an_axis_has_a_few_round_ticks(low: float, high: float, is_log: bool) -> None:
    axis = Axis.around([low, high], 0, 100, is_log)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 9
    assert all(0 <= axis.place(tick) <= 100 for tick in ticks)


def test_a_short_logarithmic_axis_has_ticks_too() -> None:
    assert len(Axis.around([16.26, 32.5], 0, 100, is_log=True).ticks()) >= 3


def test_labels_lie_on_no_other_label_or_point() -> None:
    points = [Point(f"point_{i}", 2 + 0.05 * i, 0.4 + 0.01 * (i % 3)) for i in range(5)] + [Point("far", 9, 0.001)]
    svg = scatter(points, "x", "y", "t")
    dots = [tuple(map(float, pair)) for pair in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]
    labels = re.findall(r'<text x="([\d.]+)" y="(-?[\d.]+)" fill="#\w+" text-anchor="start">(point_\d)<', svg)
    boxes = [(float(x), float(x) + 7 * len(text), float(y) - 4) for x, y, text in labels]
    assert len(boxes) == 5
    for i, (left, right, y) in enumerate(boxes):
        assert not any(left < x < right and abs(y - cy) < 8 for x, cy in dots)
        assert not any(left < b and a < right and abs(y - other) < 12 for a, b, other in boxes[:i])


def test_a_group_without_speed_has_an_empty_cell() -> None:
    assert page.cells(Group("a", [row()]))[10:12] == ["", ""]


def test_a_folder_with_other_files_is_not_touched(settings: list[str], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "index.html").write_text("mine")
    for force in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            compare.run("toy", steps=1, out=out, force=force, overrides=settings)
    assert [path.name for path in out.iterdir()] == ["index.html"]
    assert (out / "index.html").read_text() == "mine"


def test_forced_rows_are_measured_again(tmp_path: Path) -> None:
    kept = Store(tmp_path).put(row())
    assert Store(tmp_path).get("a", "") == kept
    assert Store(tmp_path, keeps=False).get("a", "") is None


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_references_round_what_our_methods_round(model_type: str, tmp_path: Path) -> None:
    toy_files(tmp_path, family(model_type))
    config = resolved(tmp_path)
    with open_run(config) as opened:
        found = references.reference("int8", quality.Test(opened))
    assert found.coverage > 0.9
    assert 8 < found.bits < 9
    assert 0 < found.kl < 0.01
    assert found.bytes < opened.model.num_parameters() * 1.5
