"""Tasks: the words of the prompts, answers alone learned, examples never cut, and what is said of bad rows."""

import dataclasses
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data import packing, stdlib, stdlib_kind, tasks
from wrinklefree.data.open import heldout_batches, heldout_examples, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.sources import Example
from wrinklefree.data.tokenizer import train_tokenizer

ROWS: dict[str, dict[str, Any]] = {
    "sst2": {"sentence": "a fine film ", "idx": 3},
    "mnli": {"premise": "It rains.", "hypothesis": " the sun shines", "idx": 3},
    "qnli": {"question": "Who?", "sentence": "Ada did.", "idx": 3},
    "boolq": {"passage": "It rains.", "question": "does it rain", "idx": 3},
    "cb": {"premise": "It rains.", "hypothesis": "the sun shines", "idx": 3},
    "rte": {"premise": "It rains.", "hypothesis": "The sun shines.", "idx": 3},
    "wic": {
        "sentence1": "We sat on a bank.",
        "sentence2": "The bank is shut.",
        "start1": 12,
        "end1": 16,
        "word": "bank",
    },
    "copa": {"premise": "It rained. ", "question": "effect", "choice1": "I got wet.", "choice2": "I sang.", "idx": 3},
    "cnn_dailymail": {"article": "Much happened.", "highlights": "Things .\nMore things .", "id": "x"},
}
PROMPTS = {
    "sst2": "a fine film \nQuestion: Is this sentence positive or negative?\nAnswer:",
    "mnli": "It rains.\nQuestion: the sun shines. True, False or Neither?\nAnswer:",
    "qnli": "Who?\nAda did.\nQuestion: Does this response answer the question?\nAnswer:",
    "boolq": "It rains.\nQuestion: does it rain?\nAnswer:",
    "cb": "It rains.\nQuestion: the sun shines. True, False, or Neither?\nAnswer:",
    "rte": "It rains.\nQuestion: The sun shines. True or False?\nAnswer:",
    "wic": "Sentence 1: We sat on a bank.\nSentence 2: The bank is shut.\n"
    "Question: Is the word 'bank' used in the same way in the two sentences above?\nAnswer:",
    "copa": "It rained therefore",
    "cnn_dailymail": "Summarize the following article:\n\nMuch happened.\n\nSummary:",
}
LABELS = {
    "sst2": {"negative": " negative", "positive": " positive"},
    "mnli": {"entailment": " True", "neutral": " Neither", "contradiction": " False"},
    "qnli": {"entailment": " yes", "not_entailment": " no"},
    "boolq": {"False": " no", "True": " yes"},
    "cb": {"entailment": " True", "contradiction": " False", "neutral": " Neither"},
    "rte": {"entailment": " True", "not_entailment": " False"},
    "wic": {"False": " no", "True": " yes"},
    "copa": {"choice1": " I got wet.", "choice2": " I sang."},
}
LABELLED = [(task, number, name) for task, names in LABELS.items() for number, name in enumerate(names)]

SENTENCES = [f"sentence {i} is{' very' * (i % 7)} {'good' if i % 3 else 'bad'}" for i in range(90)]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([f"{s} {PROMPTS['sst2']} negative positive\n" for s in SENTENCES], vocab_size=400)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [{"sentence": s, "label": int(i % 3 > 0)} for i, s in enumerate(SENTENCES)])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def downstream(path: Path | None, task: str | None = "sst2", **values: Any) -> DataConfig:
    return DataConfig(source="downstream", task=task, path=None if path is None else str(path), **values)


def stream(config: DataConfig, tokenizer: PreTrainedTokenizerFast, **kwargs: int) -> BatchStream:
    return training_stream(config, tokenizer, **{"batch_size": 2, "length": 96, "seed": 5} | kwargs)


def learned(batch: Batch, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The answers that a batch teaches, in order."""
    return tokenizer.decode(batch["labels"][batch["labels"] != IGNORE]).split(END)[:-1]


def shown(batch: Batch, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The documents of a batch, padding left out."""
    return [text for row in batch["input_ids"] for text in tokenizer.decode(row).split(END) if text]


def answer(row: dict[str, Any], task: str = "sst2") -> str:
    return tasks.render(tasks.TASKS[task], row, "here").answer


def text_of(i: int) -> str:
    row = {"sentence": SENTENCES[i], "label": int(i % 3 > 0)}
    return f"{SENTENCES[i]}\nQuestion: Is this sentence positive or negative?\nAnswer:{answer(row)}"


@pytest.mark.parametrize(("task", "number", "name"), LABELLED)
def test_a_label_is_in_the_answer_and_not_in_the_prompt(task: str, number: int, name: str) -> None:
    by_number = tasks.render(tasks.TASKS[task], ROWS[task] | {"label": number}, "here")
    assert by_number.prompt == PROMPTS[task]  # whatever the label
    assert by_number.answer == LABELS[task][name]
    assert by_number.choices == tuple(LABELS[task].values())
    assert tasks.render(tasks.TASKS[task], ROWS[task] | {"label": name}, "here") == by_number


def test_a_summary_is_the_answer_and_has_no_choices() -> None:
    found = tasks.render(tasks.TASKS["cnn_dailymail"], ROWS["cnn_dailymail"], "here")
    assert found == Example(PROMPTS["cnn_dailymail"], " Things .\nMore things .", ())


def test_a_hypothesis_ends_with_one_full_stop() -> None:
    row = ROWS["mnli"] | {"hypothesis": "It is dry. ", "label": 0}
    assert "\nQuestion: It is dry. True, " in tasks.render(tasks.TASKS["mnli"], row, "here").prompt


HARNESS = {
    "sst2": "glue/sst2/default.yaml",
    "mnli": "glue/mnli/default.yaml",
    "qnli": "glue/qnli/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "cb": "super_glue/cb/default.yaml",
    "rte": "super_glue/rte/default.yaml",
    "copa": "super_glue/copa/default.yaml",
    "cnn_dailymail": "cnn_dailymail/cnn_dailymail.yaml",
}


@pytest.mark.parametrize("name", HARNESS)
def test_prompts_are_those_of_the_harness(name: str) -> None:
    """Its files are read, not imported: its imports take long and need packages that this test does not."""
    import yaml
    from jinja2 import Template

    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lm-evaluation-harness is not installed")
    path = Path(spec.origin).parent / "tasks" / HARNESS[name]

    class Loader(yaml.SafeLoader):
        """Knows `!function module.name`."""

    Loader.add_constructor("!function", lambda loader, node: _function(path.parent, loader.construct_scalar(node)))
    theirs, ours = yaml.load(path.read_text(), Loader), tasks.TASKS[name]
    assert (theirs["dataset_path"], theirs["dataset_name"]) == (ours.path, ours.subset)
    choices = theirs.get("doc_to_choice", [])
    choices = yaml.safe_load(Template(choices).render(ROWS[name])) if isinstance(choices, str) else choices
    assert choices == list(ours.words or [ROWS[name][column] for column in ours.answers])
    assert theirs.get("validation_split", ours.heldout) == ours.heldout
    ask = theirs["doc_to_text"]
    assert (Template(ask).render(ROWS[name]) if isinstance(ask, str) else ask(ROWS[name])) == ours.prompt(ROWS[name])


def _function(folder: Path, name: str) -> Any:
    """`module.function` of a task's folder; None where its module needs packages that are not here."""
    module, _, function = name.partition(".")
    spec = importlib.util.spec_from_file_location(module, folder / f"{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(loaded)
    except ModuleNotFoundError:
        return None
    return vars(loaded)[function]


def test_the_answer_alone_is_learned(rows: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = next(stream(downstream(rows), tokenizer, batch_size=4))
    documents = shown(batch, tokenizer)
    assert learned(batch, tokenizer) == [text.rpartition("Answer:")[2] for text in documents]
    assert {text.rpartition(" ")[2] for text in documents} == {"positive", "negative"}


def test_an_epoch_has_every_example_once_and_whole(rows: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    batches, seen = stream(downstream(rows, shuffle_buffer=10), tokenizer, batch_size=1), []
    while len(seen) < 85:
        seen += shown(next(batches), tokenizer)
    assert sorted(seen[:85]) == sorted(text_of(i) for i in range(90) if i % 20)
    heldout = heldout_batches(downstream(rows), tokenizer, batch_size=2, length=96)
    assert [text for batch in heldout for text in shown(batch, tokenizer)] == [text_of(i) for i in range(0, 90, 20)]
    assert [a for batch in heldout for a in learned(batch, tokenizer)] == [
        text_of(i).rpartition(":")[2] for i in range(0, 90, 20)
    ]


def test_an_example_goes_to_the_next_block_when_it_does_not_fit() -> None:
    documents = [torch.full((3, n), n) for n in (4, 3, 5, 2)]
    blocks = packing.pack_whole(documents, length=8, pad=9)
    assert blocks[:, 0].tolist() == [[4] * 4 + [3] * 3 + [9], [5] * 5 + [2] * 2 + [9]]


def test_padding_stands_alone_and_is_not_learned() -> None:
    block = packing.pack_whole([packing._document([1, 2, 3, 0], prompt=2)], length=7, pad=0)
    batch = packing.make_batch(block)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 3, 0, IGNORE, IGNORE, IGNORE]]


def test_a_stream_packs_like_the_whole(rows: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = stream(downstream(rows), tokenizer, batch_size=1)
    blocks = torch.cat([next(batches)["input_ids"] for _ in range(20)])
    documents = [text for row in blocks for text in shown({"input_ids": row.unsqueeze(0)}, tokenizer)]
    ids = [torch.tensor([*tokenizer(text)["input_ids"], 0]).expand(3, -1) for text in documents]
    assert torch.equal(packing.pack_whole(ids, 96, pad=0)[:, 0], blocks)


@pytest.mark.parametrize("before", [0, 1, 23])
def test_resume_is_exact(before: int, rows: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = downstream(rows, shuffle_buffer=7)
    batches = stream(config, tokenizer)
    for _ in range(before):
        next(batches)
    saved = io.BytesIO()
    torch.save(batches.state_dict(), saved)
    saved.seek(0)
    resumed = stream(config, tokenizer, batch_size=1, rank=1, world_size=2)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for _ in range(30):
        assert torch.equal(next(resumed)["input_ids"], next(batches)["input_ids"][1:])
    assert batches.state_dict()["epoch"] > 0


@pytest.mark.parametrize("length", [24, 12, 5])
def test_a_long_example_loses_the_beginning_of_its_prompt(
    length: int, rows: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    batch = next(stream(downstream(rows), tokenizer, batch_size=8, length=length))
    assert {a.strip() for a in learned(batch, tokenizer)} == {"positive", "negative"}
    assert all(text.endswith(a) for text, a in zip(shown(batch, tokenizer), learned(batch, tokenizer), strict=True))
    assert (batch["labels"][:, 0] == IGNORE).all()


def test_prompt_and_answer_are_tokenized_as_one_text() -> None:
    """Also by a tokenizer that merges over the border: `ab` is one token, and all of it is the prompt's last."""
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "ab": 3, "<eos>": 4}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    (document,) = packing.encode(tokenizer, [Example("ca", "bc")])
    assert document.tolist() == [[2, 3, 2, 4], [1, 0, 0, 0], [0, 0, 1, 1]]


def test_rows_without_a_label_are_skipped(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    held = [{"sentence": "unlabelled", "label": -1}, {"sentence": "held out", "label": "positive"}]
    path = write(tmp_path / "a.jsonl", [*held, {"sentence": "trained", "label": 0}])
    batch = next(stream(downstream(path), tokenizer, batch_size=1))
    assert {text.partition("\n")[0] for text in shown(batch, tokenizer)} == {"trained"}
    examples = heldout_examples(downstream(path), tokenizer)
    assert [e.prompt.partition("\n")[0] for e in examples] == ["held out"]
    assert [e.answer for e in examples] == [" positive"]


def test_named_heldout_file_leaves_training_whole(
    tmp_path: Path, rows: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    heldout = tmp_path / "heldout.parquet"
    pq.write_table(pa.Table.from_pylist([{"sentence": "only this", "label": 1}]), heldout)
    config = downstream(rows, heldout_path=str(heldout))
    assert len(heldout_examples(config, tokenizer)) == 1
    batches, seen = stream(config, tokenizer, batch_size=1), []
    while len(seen) < 90:
        seen += shown(next(batches), tokenizer)
    assert sorted(seen[:90]) == sorted(text_of(i) for i in range(90))


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    """The hub's code path without the hub: a folder that `load_dataset` knows."""
    files = {"train": SENTENCES[:80], "validation": SENTENCES[80:]}
    for split, sentences in files.items():
        write(tmp_path / f"{split}.jsonl", [{"sentence": s, "label": 1} for s in sentences])
    splits = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in files)
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{splits}---\n")
    monkeypatch.setitem(tasks.TASKS, "sst2", dataclasses.replace(tasks.TASKS["sst2"], path=str(tmp_path)))
    batches = stream(downstream(None), tokenizer, batch_size=40)
    assert {text.partition("\n")[0] for text in shown(next(batches), tokenizer)} <= set(SENTENCES[:80])
    assert batches.state_dict()["data"]["data.path"].keys() == {"README.md", "train.jsonl", "validation.jsonl"}
    examples = heldout_examples(downstream(None), tokenizer)
    assert [e.prompt.partition("\n")[0] for e in examples] == SENTENCES[80:]


def test_without_a_network(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^data\.task=sst2 data\.path=nyu-mll/glue: HF_HUB_OFFLINE is set: use task="):
        stream(downstream(None), tokenizer)


BAD_ROWS = {
    "column": (
        "sst2",
        {"text": "a", "label": 1},
        "row 2: no column 'sentence', which sst2 needs; there are text, label",
    ),
    "label": ("sst2", {"sentence": "a", "label": 2}, "row 2: label 2; sst2 has negative, positive, or 0 to 1"),
    "name": ("sst2", {"sentence": "a", "label": "good"}, "row 2: label 'good'; sst2 has negative, positive"),
    "none": ("sst2", {"sentence": None, "label": 1}, "row 2: column 'sentence' holds NoneType, not text"),
    "number": (
        "wic",
        ROWS["wic"] | {"start1": None, "label": 1},
        "row 2: column 'start1' holds NoneType, not a whole number",
    ),
    "summary": ("cnn_dailymail", {"article": "a", "highlights": 3}, "row 2: column 'highlights' holds int, not text"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_one_line_naming_it(
    name: str, suffix: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    task, row, message = BAD_ROWS[name]
    good = ROWS[task] | {"label": type(row.get("label", 1))(1) if name != "name" else "positive"}
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write(path, [good, row])
    else:  # a table has one set of columns
        table = [row, row] if name in ("column", "summary") else [{k: good[k] for k in row}, row]
        pq.write_table(pa.Table.from_pylist(table), path)
        message = message.replace("row 2", "row [12]")
    with pytest.raises(UserError, match=message) as caught:
        next(stream(downstream(path, task), tokenizer))
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)


BAD_SETTINGS = [
    (
        downstream(None, "sst3"),
        r"data\.task=sst3: no such task \(did you mean 'sst2'\?\); there are sst2, mnli, .*stdlib_kind",
    ),
    (downstream(None, None), "data.task: a value is required: one of sst2, mnli"),
    (downstream(Path("x"), "stdlib_kind"), "data.path=x has no effect with task=stdlib_kind"),
    (downstream(None, heldout_path="x"), "data.heldout_path=x has no effect without data.path"),
    (downstream(None, split="test"), "data.split=test has no effect with data.source=downstream"),
    (downstream(Path("no/such")), "data.path=no/such: no such file or folder"),
    (DataConfig(source="stdlib", task="sst2"), "data.task=sst2 has no effect with data.source=stdlib"),
]


@pytest.mark.parametrize(("config", "message"), BAD_SETTINGS)
def test_bad_settings(config: DataConfig, message: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=message):
        stream(config, tokenizer)
    with pytest.raises(UserError, match=message):
        heldout_batches(config, tokenizer, batch_size=1, length=8)


FORMATS = ["jsonl", "json", "parquet", "csv"]
SPLITS: list[stdlib.Split] = ["train", "heldout"]


@pytest.mark.parametrize("split", SPLITS)
def test_stdlib_kind_is_balanced_and_names_no_package(split: stdlib.Split) -> None:
    examples = stdlib_kind.examples(split)
    answers = [e.answer for e in examples]
    assert len(examples) >= {"train": 2400, "heldout": 400}[split]
    assert {answers.count(a) for a in answers} == {len(examples) // len(stdlib_kind.PACKAGES)}
    assert {e.choices for e in examples} == {tuple(f" {name}" for name in stdlib_kind.PACKAGES)}
    assert not [e.prompt for e in examples for name in stdlib_kind.PACKAGES if name in e.prompt.lower()]
    assert len({e.prompt for e in examples}) > 0.99 * len(examples)


def test_stdlib_kind_deals_whole_files() -> None:
    library = stdlib.library()
    for name in stdlib_kind.PACKAGES:
        dealt = stdlib_kind._split(name, library)
        files = [list(stdlib_kind._pieces(text)) for path, text in library.items() if path.startswith(f"{name}/")]
        assert sum(map(len, files)) == len(dealt["train"]) + len(dealt["heldout"])
        sides = {split: set(pieces) for split, pieces in dealt.items()}
        assert all(set(pieces) <= sides["train"] or set(pieces) <= sides["heldout"] for pieces in files)


def test_stdlib_kind_tests_on_nothing_it_trained_on() -> None:
    train, heldout = ({e.prompt for e in stdlib_kind.examples(split)} for split in SPLITS)
    assert not train & heldout


def test_stdlib_kind_streams(tokenizer: PreTrainedTokenizerFast) -> None:
    config = downstream(None, "stdlib_kind")
    batch = next(stream(config, tokenizer, batch_size=8, length=512))
    assert set(learned(batch, tokenizer)) <= {f" {name}" for name in stdlib_kind.PACKAGES}
    assert len(learned(batch, tokenizer)) >= 8
    assert heldout_examples(config, tokenizer) == list(stdlib_kind.examples("heldout"))


def test_other_data_has_no_examples(tokenizer: PreTrainedTokenizerFast) -> None:
    assert heldout_examples(DataConfig(source="stdlib"), tokenizer) == []


@pytest.mark.parametrize("task", ["wic", "copa"])
def test_a_task_reads_the_same_from_every_format(task: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet as pq

    rows = [ROWS[task] | {"label": number % 2} for number in range(3)]
    write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pa.csv.write_csv(pa.Table.from_pylist(rows), tmp_path / "a.csv")
    read = [heldout_examples(downstream(tmp_path / f"a.{kind}", task), tokenizer) for kind in FORMATS]
    assert all(examples == [tasks.render(tasks.TASKS[task], rows[0], "here")] for examples in read)


def test_the_question_of_copa_is_asked_for_causes_too() -> None:
    row = ROWS["copa"] | {"question": "cause", "label": 0}
    assert tasks.render(tasks.TASKS["copa"], row, "here").prompt == "It rained because"


def test_a_csv_has_labels_as_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    lines = [f'"{sentence}",{i % 3 - 1}' for i, sentence in enumerate(SENTENCES)]
    (tmp_path / "a.csv").write_text("\n".join(["sentence,label", *lines]))
    write(tmp_path / "a.jsonl", [{"sentence": s, "label": i % 3 - 1} for i, s in enumerate(SENTENCES)])
    text, numbers = (heldout_examples(downstream(tmp_path / name), tokenizer) for name in ("a.csv", "a.jsonl"))
    assert text == numbers
    assert text
