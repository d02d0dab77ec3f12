"""Files that others made: read, or refused in a line, in bounded time and memory (benchmarks/hostile.py)."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks import hostile
from wrinklefree.config.compose import local_settings, read_yaml
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import DEEPEST_JSON, read_json
from wrinklefree.core.numbers import not_numbers
from wrinklefree.data import template
from wrinklefree.data.template import as_chat
from wrinklefree.families.foreign import refused_in_one_line
from wrinklefree.models.load import load_model

torch.set_num_threads(1)

SECONDS = 30


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return hostile.make_samples(tmp_path_factory.mktemp("hostile") / "samples")


def test_mutants_of_every_kind_are_read_or_refused_in_a_line(
    samples: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written beside their folder. The benchmark tries them by the thousand."""
    monkeypatch.setattr(template, "SECONDS", 1.0)
    found: Counter[str] = Counter()
    for mutant, outcome in hostile.run(samples, hostile.mutations(samples, 120, seed=2), tmp_path, SECONDS):
        assert outcome.verdict in ("read", "refused"), f"{mutant.kind} {mutant.name}: {outcome.message}"
        found[outcome.verdict] += 1
    assert found["refused"] > 40  # so most mutations damage something
    assert found["read"] > 10


def test_samples_themselves_are_read(samples: dict[str, Path], tmp_path: Path) -> None:
    assert samples.keys() == hostile.READERS.keys()
    for kind, sample in samples.items():
        shutil.copytree(sample, tmp_path / kind)
        outcome = hostile.attempt(hostile.READERS[kind], tmp_path / kind, samples, SECONDS)
        assert outcome.verdict == "read", f"{kind}: {outcome.message}"


@pytest.mark.parametrize("name", ["outside", "another", "another/file"])
def test_a_reader_that_writes_outside_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, samples: hostile.Samples) -> None:
        if folder.joinpath("config.json").read_text() == "first":
            (folder.parent / name).parent.mkdir(exist_ok=True)
            (folder.parent / name).write_text("was here")

    monkeypatch.setitem(hostile.READERS, "model", write)
    (tmp_path / "model").mkdir()
    (tmp_path / "scratch").mkdir()
    mutants = [
        hostile.Mutant("model", text, lambda folder, text=text: (folder / "config.json").write_text(text))
        for text in ("first", "second")
    ]
    found = hostile.run({"model": tmp_path / "model"}, iter(mutants), tmp_path / "scratch")
    assert [outcome.verdict for _, outcome in found] == ["wrote outside", "read"]


def test_equal_seeds_give_equal_mutants(samples: dict[str, Path], tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for name in ("one", "two"):
        for mutant in hostile.mutations(samples, 3, seed=5, kinds=["model"]):
            folder = tmp_path / f"{name}_{mutant.name.partition(':')[0]}"
            shutil.copytree(samples["model"], folder)
            mutant.mutate(folder)
            made.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert made[:3] == made[3:]
    assert made[0] != made[1]


def edit(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def set_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NORM, UP = "model.layers.0.input_layernorm.weight", "model.layers.0.mlp.up_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a billion layers": (lambda f: edit(f, "config.json", num_hidden_layers=10**9), "but the files have 21 tensors"),
    "a huge width": (lambda f: edit(f, "config.json", hidden_size=2**40), "no model has such a size"),
    "another width": (lambda f: edit(f, "config.json", hidden_size=2**20), "by config.json"),
    "norms of int16": (lambda f: set_tensor(f, NORM, lambda t: t.to(torch.int16)), "I16, not floating-point numbers"),
    "NaN norms": (lambda f: set_tensor(f, NORM, lambda t: t * torch.nan), f"{NORM} holds NaN"),
    "NaN weights": (lambda f: set_tensor(f, UP, lambda t: t / 0), f"{UP} holds NaN"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 9999 + "]" * 9999), "nested more than"),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "an adapter of another model"),
    "other weights": (lambda f: edit(f, "config.json", transformers_weights="../x"), "another file of weights"),
    "eos a text": (lambda f: edit(f, "generation_config.json", eos_token_id="x"), "no token"),
    "no tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "no tokenizer"),
    "tokenizer a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "no tokenizer"),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes((10**8).to_bytes(8, "little") + b"{" * 99),
        "truncated, or not a safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused_at_once(damage: str, samples: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(samples["model"], folder)
    change, said = DAMAGES[damage]
    change(folder)
    start = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/hostname", "..\\model.safetensors", "", 3, None])
def test_an_index_that_names_files_elsewhere_is_refused(name: object, samples: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(samples["sharded"], folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="leads out of the folder"):
        load_model(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    llama(vocab_size=90).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="ids up to 94, its embedding has 90 rows"):
        load_model(tmp_path)


def test_packed_codes_of_another_shape_are_refused(samples: dict[str, Path], tmp_path: Path) -> None:
    """Also if config.json and the file agree on it: the method has to be able to decode them."""
    folder = tmp_path / "packed"
    shutil.copytree(samples["packed"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["index_shape"] = [2, 2, 24, 15]
    (folder / "config.json").write_text(json.dumps(config))
    set_tensor(folder, UP, lambda codes: codes[..., :4].contiguous())
    with pytest.raises(UserError, match=r"up_proj.*(decode|decodes)"):
        load_model(folder)


LAUGHS = hostile.LAUGHS
YAML = {"laughs": (LAUGHS, "aliases written out"), "itself": ("a: &a [*a]", "aliases written out")}
YAML |= {"deep": ("[" * 9999, "not a readable YAML"), "long": ("x" * 999_999, "too many for settings")}


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_bounded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = YAML[name]
    for file in ("wrinklefree.yaml", "local.yaml"):
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    start = time.process_time()  # others on the same cores do not count
    with pytest.raises(UserError, match=said):
        read_yaml(tmp_path / "wrinklefree.yaml")
    with pytest.raises(UserError, match=said):
        local_settings([])
    assert time.process_time() - start < 10


def test_json_is_bounded(tmp_path: Path) -> None:
    for depth in (DEEPEST_JSON - 1, DEEPEST_JSON + 1):
        (tmp_path / "a.json").write_text("[" * depth + "]" * depth)
        if depth < DEEPEST_JSON:
            assert read_json(tmp_path / "a.json")
        else:
            with pytest.raises(UserError, match="nested more than"):
                read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match="more than the 9 that"):
        read_json(tmp_path / "a.json", largest=9)
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("source", hostile.TEMPLATES)
def test_chat_templates_get_little_time_and_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.5)
    words = tokenizer()
    words.chat_template = source
    start = time.monotonic()
    said = written(words)
    assert len(said) < 400
    assert "\n" not in said
    assert time.monotonic() - start < 10


def written(words: PreTrainedTokenizerFast) -> str:
    """What the template writes, or why it was refused."""
    try:
        return as_chat(words, [{"role": "user", "content": "a"}])
    except UserError as error:
        return str(error)


def test_the_limits_of_a_template_end_with_it() -> None:
    import resource
    import sys

    words, before = tokenizer(), (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace())
    for source in ("{{ 'x' * 9999999999 }}", "{{ messages[0].content }}"):
        words.chat_template = source
        assert written(words) == "a" or "MiB of memory" in written(words)
        assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_numbers_are_told_from_what_is_none(dtype: torch.dtype) -> None:
    assert not not_numbers(torch.ones(3, 4).to(dtype))
    assert "NaN" in not_numbers(torch.tensor([1.0, torch.nan]).to(dtype))
    assert not not_numbers(torch.full((9,), 3e38))  # finite, but their sum is not
    assert "int16" in not_numbers(torch.ones(3, dtype=torch.int16))


class PanicException(BaseException):
    """Named as what tokenizers raises for a panic, which is no `Exception`."""


def test_a_panic_of_a_library_is_one_line_and_ctrl_c_is_none() -> None:
    with pytest.raises(UserError, match="tokenizer: no entry found for key"), refused_in_one_line("tokenizer"):
        raise PanicException("no entry found for key")
    with pytest.raises(KeyboardInterrupt), refused_in_one_line("tokenizer"):
        raise KeyboardInterrupt
