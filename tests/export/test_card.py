"""The model card says what a model is and how it was made, and tells no path of the machine."""

import json
from pathlib import Path

import pytest
import yaml
from toyrun import resolved, rows, toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.evaluate.perplexity import Quality
from wrinklefree.export.card import card
from wrinklefree.runs import exporting
from wrinklefree.runs.report import read_results, training_rows
from wrinklefree.runs.stage import train_stage


def front_of(text: str) -> dict[str, object]:
    values = yaml.safe_load(text.split("---")[1])
    assert isinstance(values, dict)
    return values


def folder_with(path: Path, readme: str) -> Path:
    folder = path / "my_model"
    folder.mkdir()
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def test_a_hub_model_is_named_as_the_base() -> None:
    text = card(load_config(["model=smollm2_135m", "training=fairy2_w2"]))
    assert front_of(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "| num_stages | 2 |" in text
    assert "| with | wrinklefree " in text


def test_a_folder_gives_its_licence_and_its_last_name_only(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "---\nlanguage: en\nlicense: apache-2.0\n---\n# Mine\n")
    text = card(load_config([f"model={folder}", "training=fairy2_w2", "data=local", f"data.path={tmp_path}"]))
    front = front_of(text)
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front
    assert "`my_model` quantized" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("readme", ["", "no front matter, license: mit", "---\nlicense: [a, b]\n---\n", "---\nopen"])
def test_a_card_without_a_plain_licence_gives_none(tmp_path: Path, readme: str) -> None:
    text = card(load_config([f"model={folder_with(tmp_path, readme)}", "training=fairy2_w2"]))
    assert "license" not in front_of(text)


def test_the_embedded_model_is_no_id_of_the_hub() -> None:
    assert "base_model" not in front_of(card(load_config(["model=tiny", "training=fairy2_w2"])))


def test_facts_of_the_training_are_rows() -> None:
    text = card(load_config(["model=tiny", "training=fairy2_w2"]), {"learning rate": "1e-4"})
    assert "| learning rate | 1e-4 |" in text


def test_what_is_exported_later_has_the_figures_of_its_training(tmp_path: Path) -> None:
    """The packed folder and other formats: steps, rate, loss, and quality before and after. A checkpoint has none."""
    toy_files(tmp_path)
    config = resolved(tmp_path, "training.max_steps=3", "training.save_interval=2")
    train_stage(config, force=False)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    last = rows(tmp_path / "run")[-1]["train_loss"]
    for source, format in (("run", "hf"), ("run", "dense"), ("run/checkpoints/step_2", "dense")):
        target = tmp_path / f"{source.replace('/', '_')}_{format}"
        exporting.write(exporting.opened(tmp_path / source, trust_remote_code=False), format, target, {})
        text = (target / "README.md").read_text()
        measured = source == "run"
        assert ("| training | 3 steps, 96 tokens in rows of 16 |" in text) == measured
        assert (f"| last training loss | {float(last):.4f} |" in text) == measured
        assert ("| learning rate | 0.001, schedule wsd |" in text) == measured
        quality = [f"{results[state]['ppl']:.2f}" for state in ("full_precision", "one_shot", "trained")]
        assert (f"| held-out perplexity | {' | '.join(quality)} |" in text) == measured
        assert "| objective | language_modelling |" in text


def test_a_run_of_an_earlier_version_has_a_card_without_the_figures_that_it_did_not_keep(tmp_path: Path) -> None:
    quality = {"nll": 2.0, "tokens": 64, "kl": 0.5, "same_top1": 0.9, "ppl": 7.389}
    (tmp_path / "results.json").write_text(json.dumps({"context": 16, "trained": quality}))
    results = read_results(tmp_path / "results.json")
    assert results.trained == Quality(2.0, 64, 0.5, 0.9)
    assert training_rows(results.training) == {}


def test_results_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"context": "many"}')
    with pytest.raises(UserError, match=r"results\.json: context: .*not the results of a run"):
        read_results(tmp_path / "results.json")
