"""The model card says what a model is, how to load it and how it was made, and tells no path of the machine."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from tiny import llama
from toyrun import overrides, resolved, rows, toy_files

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import constant
from wrinklefree.core.method import Coverage
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.evaluate.perplexity import Quality
from wrinklefree.export.card import NO_TRAINING, Card
from wrinklefree.export.flags import check_package, formats
from wrinklefree.export.origin import origin_of
from wrinklefree.runs import again, exporting
from wrinklefree.runs.cards import base_folder
from wrinklefree.runs.report import read_results, training_rows
from wrinklefree.runs.stage import train_stage

WEIGHTS = (".safetensors", ".gguf", ".pt", ".mlpackage", ".aimodel")

# What each card has to tell.
FIELDS = {
    "base model": r"^\| base model \| the folder `toy`, which names `me/small` as its source \|$",
    "licence": r"^\| licence \| apache-2\.0, as the base model states \|$",
    "method": r"^\| method \| bitdistill \|$",
    "bits": r"^\| bits per weight, before scales \| 1\.58 \|$",
    "coverage": r"^\| of the blocks' weights, quantized \| 100\.00% \|$",
    "data": r"^\| data \| local files, text \(data=local\) \|$",
    "tokens": r"^\| training \| 2 steps, 64 tokens in rows of 16 \|$",
    "lr": r"^\| learning rate \| 0\.001, schedule wsd \|$",
    "versions": r"^\| written with \| wrinklefree [\w.]+, torch \S+, transformers [\w.]+ \|$",
    "quality": r"^## Quality\n\nOn \d+ held-out tokens",
    "size": r"^## Size\n\n.*\n.*\n\| .+ \| [\d,]+ bytes \|$",
    "certificate": r"^## Certificate\n\n(?s:.*)\| (same most likely token|layers with identical weights) \| ",
    "how to load": r"^## Use\n\n(?s:.*?){name}",
    "command": r"^wf train model=\./toy training=ternary .*training\.max_steps=2 .*\nwf export outputs/\S+ --format ",
}


def front_of(text: str) -> dict[str, object]:
    values = yaml.safe_load(text.split("---")[1])
    assert isinstance(values, dict)
    return values


def card(config: Config, training: Mapping[str, str] = NO_TRAINING) -> str:
    name = config.model.pretrained
    origin, line = origin_of(name, base_folder(name)), again.command(config)
    return Card(config, origin, Coverage(1, 1), line, again.run_folder(config), training).beginning("from here")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that every format can hold: ternary, one scale per tensor, in a plain Llama with a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("trained")
    toy_files(folder, llama(vocab_size=262))
    train_tokenizer(["w1 w2 w3 " * 20], vocab_size=262).save_pretrained(folder / "toy")
    (folder / "toy" / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: me/small\n---\n# Small\n")
    settings = [word for word in overrides(folder, "training.max_steps=2") if not word.startswith("training=")]
    train_stage(load_config([*settings, "training=ternary", "method.granularity=tensor"]), force=False)
    return folder / "run"


@pytest.mark.parametrize("format", formats())
def test_the_card_of_every_format_is_filled(format: str, trained: Path, tmp_path: Path) -> None:
    try:
        check_package(format)
    except UserError as missing:
        pytest.skip(str(missing))
    target = tmp_path / f"toy-{format}"
    exporting.write(exporting.opened(trained, trust_remote_code=False), format, target, {})
    text = (target / "README.md").read_text()
    for field, pattern in FIELDS.items():
        assert re.search(pattern.replace("{name}", target.name), text, re.MULTILINE), f"no {field} in:\n{text}"
    front = front_of(text)
    assert (front["base_model"], front["license"]) == ("me/small", "apache-2.0")
    assert front["library_name"] == constant(formats()[format], "LIBRARY", "transformers")
    assert not re.search(r"(?<![\w.*])/\w", text), "an absolute path"
    size = sum(
        f.stat().st_size for p in target.iterdir() if p.suffix in WEIGHTS for f in (p, *p.rglob("*")) if f.is_file()
    )
    assert f" {size:,} bytes" in text


def test_the_packed_folder_of_a_run_has_no_command_for_an_export(trained: Path) -> None:
    text = (trained / "packed" / "README.md").read_text()
    for field, pattern in FIELDS.items():
        pattern = pattern.partition(r"\nwf export")[0].replace("{name}", "packed")
        assert re.search(pattern, text, re.MULTILINE), f"no {field} in:\n{text}"
    assert "wf export" not in text


def test_options_of_an_export_are_in_its_command(trained: Path, tmp_path: Path) -> None:
    source = exporting.opened(trained, trust_remote_code=False)
    exporting.write(source, "gguf", tmp_path / "out", {"gguf_embedding": "q8_0"})
    assert "--format gguf --gguf-embedding q8_0\n" in (tmp_path / "out" / "README.md").read_text()


def folder_with(path: Path, readme: str) -> Path:
    folder = path / "my_model"
    folder.mkdir()
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def test_a_hub_model_is_named_as_the_base() -> None:
    text = card(load_config(["model=smollm2_135m", "training=fairy2_w2"]))
    assert front_of(text)["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "| num_stages | 2 |" in text
    assert "| licence | see the page of HuggingFaceTB/SmolLM2-135M |" in text


def test_a_folder_gives_its_licence_and_its_last_name_only(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "---\nlanguage: en\nlicense: apache-2.0\n---\n# Mine\n")
    text = card(load_config([f"model={folder}", "training=fairy2_w2", "data=local", f"data.path={tmp_path}"]))
    front = front_of(text)
    assert front["license"] == "apache-2.0"
    assert "base_model" not in front
    assert "`my_model`, quantized" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("readme", ["", "no front matter, license: mit", "---\nlicense: [a, b]\n---\n", "---\nopen"])
def test_a_licence_that_is_not_stated_plainly_is_not_copied(tmp_path: Path, readme: str) -> None:
    text = card(load_config([f"model={folder_with(tmp_path, readme)}", "training=fairy2_w2"]))
    assert "license" not in front_of(text)
    assert "| licence | not stated by the base model |" in text


@pytest.mark.parametrize(
    ("readme", "loaded_from", "source"),
    [
        ("---\nbase_model: me/small\n---\n", None, "me/small"),
        ("---\nbase_model: 'me/small'\n---\n", "they/large", "me/small"),
        ("", "they/large", "they/large"),
        ("", "/home/me/large", None),
        ("---\nbase_model: small\n---\n", "large", None),
    ],
)
def test_a_folder_that_names_its_source_is_made_of_that(
    tmp_path: Path, readme: str, loaded_from: str | None, source: str | None
) -> None:
    folder = folder_with(tmp_path, readme)
    (folder / "config.json").write_text(json.dumps({"_name_or_path": loaded_from}))
    text = card(load_config([f"model={folder}", "training=fairy2_w2"]))
    assert front_of(text).get("base_model") == source
    assert ("| base model | the folder `my_model` |" in text) == (source is None)


def test_the_embedded_model_is_no_id_of_the_hub_and_has_the_licence_of_this_package() -> None:
    text = card(load_config(["model=tiny", "training=fairy2_w2"]))
    assert "base_model" not in front_of(text)
    assert front_of(text)["license"] == "apache-2.0"


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
        assert ("| training | a checkpoint, after 2 steps, 64 tokens in rows of 16 |" in text) == (not measured)
        assert ("| learning rate | up to 0.001, schedule wsd |" in text) == (not measured)
        assert ("/checkpoints/step_2 --format dense" in text) == (not measured)
        quality = [f"{results[state]['ppl']:.2f}" for state in ("full_precision", "one_shot", "trained")]
        assert (f"| held-out perplexity | {' | '.join(quality)} |" in text) == measured
        assert "| objective | language_modelling, distillation=logits |" in text


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
