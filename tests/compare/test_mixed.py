"""Mixed precision: damages are measured layer by layer, the choice is the best that fits, and files keep their size."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tiny import llama
from toyrun import overrides, resolved, toy_files

from wrinklefree.commands import compare
from wrinklefree.compare import mixed
from wrinklefree.compare.mixed import Cost, best, even, per_layer, spent
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import find, quant_layers
from wrinklefree.models.load import load_model
from wrinklefree.packed.pack import packed_layers
from wrinklefree.runs.setup import open_run


def costs(layers: int, seed: int) -> mixed.Costs:
    chance = random.Random(seed)
    found = {}
    for number in range(layers):
        size, damage = chance.randint(100, 900), chance.random()
        found[f"layers.{number}"] = {v: Cost(size * v, damage * chance.random() ** v) for v in (1, 2, 3)}
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_is_the_best_of_all_that_fit(seed: int) -> None:
    table = costs(6, seed)
    budget = sum(row[2].bytes for row in table.values())
    chosen = best(table, budget)
    assert spent(table, chosen) <= budget
    fitting = (dict(zip(table, values, strict=True)) for values in itertools.product((1, 2, 3), repeat=6))
    # Bytes are rounded up to a 4096th of the budget for each layer.
    least = min(
        sum(table[fqn][v].damage for fqn, v in choice.items())
        for choice in fitting
        if spent(table, choice) <= budget - 6 * (budget // mixed.BUCKETS + 1)
    )
    assert sum(table[fqn][v].damage for fqn, v in chosen.items()) <= least + 1e-12


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0, 5.0])
def test_even_bits_fill_the_budget_with_two_neighbours(share: float) -> None:
    table = costs(40, 0)
    one, two = (sum(row[v].bytes for row in table.values()) for v in (1, 2))
    budget = int(one + share * (two - one))
    chosen = even(table, budget)
    assert spent(table, chosen) <= budget
    values = sorted(set(chosen.values()))
    assert len(values) <= 2
    assert values[-1] - values[0] <= 1
    if share <= 1:
        assert spent(table, chosen) >= budget - 900


def test_a_layer_has_the_settings_of_the_first_entry_that_names_it() -> None:
    method = find("fairy2")(per_layer=["num_stages=1 *.down_proj layers.0.self_attn", "num_stages=3 layers.0"])
    stages = {fqn: layer.config.num_stages for fqn, layer in quant_layers(method.prepare(llama())).items()}
    assert stages["model.layers.0.mlp.down_proj"] == stages["model.layers.1.mlp.down_proj"] == 1
    assert stages["model.layers.0.self_attn.q_proj"] == 1
    assert stages["model.layers.0.mlp.up_proj"] == 3
    assert stages["model.layers.1.mlp.up_proj"] == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("num_stages=9 layers.0", "method.per_layer.num_stages: input should be less than or equal to 4"),
        ("num_stagse=1 layers.0", "method.per_layer.num_stagse: unknown key"),
        ("layers.0", "is not KEY=VALUE and names of layers"),
        ("num_stages=1", "is not KEY=VALUE and names of layers"),
    ],
)
def test_mistakes_in_bits_by_layer_are_named(entry: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        resolved(tmp_path, f'method.per_layer=["{entry}"]')


def test_a_name_that_is_no_layer_is_refused() -> None:
    with pytest.raises(UserError, match="matches no layer, such as model"):
        find("fairy2")(per_layer=["num_stages=1 layers.9"]).prepare(llama())


def test_a_damage_is_the_kl_of_one_quantized_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    config = resolved(tmp_path)
    file = tmp_path / "table.json"
    with open_run(config) as opened:
        table = mixed.measured(opened, file)
        assert len(table) == 8
        assert "model.layers.1.mlp.gate_proj model.layers.1.mlp.up_proj" in table  # they have one input
        assert list(next(iter(table.values()))) == [1, 2, 3]
        for row in table.values():
            assert row[1].damage > row[3].damage >= 0
            assert row[1].bytes < row[3].bytes
        fqn = "model.layers.1.mlp.down_proj"
        others = [name for group in table for name in group.split() if name != fqn]
        exclude = ["embed_tokens", "lm_head", *others]
        alone = find("fairy2")(num_stages=1, rotate_inputs=True, exclude_names=exclude).prepare(llama())
        expected = mixed._Distance(opened, mixed.first_rows(opened, mixed.ROWS, mixed.LENGTH)).of(alone.eval())
        assert table[fqn][1].damage == pytest.approx(expected, rel=1e-3)
        before = file.read_text()
        opened.model = None  # type: ignore[assignment]  # nothing is measured again
        monkeypatch.setattr(mixed, "_made_by", lambda *args: json.loads(before)["made_by"])
        assert mixed.measured(opened, file) == table
    assert file.read_text() == before


@pytest.mark.slow
def test_mixed_bits_are_trained_and_held_against_even_ones_of_the_same_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    own = ("model=", "training=", "output_dir=", "training.max_steps=")
    settings = [each for each in overrides(tmp_path) if not each.startswith(own)]
    compare.run("toy", fit_bytes="44kB", references_named="none", steps=2, overrides=settings)
    out = Path("outputs/compare_toy")
    figures = json.loads((out / compare.FIGURES).read_text())
    rows = {row["method"]: row for row in figures["rows"]}
    assert rows.keys() == {"original", "fairy2_w2_mixed_0.044MB", "fairy2_w2_even_0.044MB"}
    for name in rows.keys() - {"original"}:
        assert 36_000 < rows[name]["bytes"] <= 44_000
        model, _ = load_model(out / "runs" / f"{name}-42" / "packed", dtype=torch.float32)
        assert len({layer.codes().index.shape[1] for layer in packed_layers(model).values()}) > 1
    assert any("sum of damages" in fact for fact in figures["facts"])
    with pytest.raises(UserError, match=re.escape("--fit-bytes 9000: too little")):
        compare.run("toy", fit_bytes="9kB", references_named="none", steps=2, overrides=settings)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fit_bytes": "1MB", "bits": 2.0}, "give one of them"),
        ({"bits": 2.0, "methods": "bitdistill"}, "bitdistill has no setting for more or fewer bits"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    options: dict[str, object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        compare.run("./toy", overrides=[], **options)
    assert not Path("outputs").exists()


def test_a_choice_is_written_as_settings() -> None:
    assert per_layer("num_stages", {"a": 2, "b": 1, "c": 2}) == ["num_stages=1 b", "num_stages=2 a c"]
