"""The model card says what a model is and how it was made, and tells no path of the machine."""

from pathlib import Path

import pytest
import yaml

from wrinklefree.config.compose import load_config
from wrinklefree.export.card import card


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
