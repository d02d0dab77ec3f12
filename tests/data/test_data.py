"""Data: what a batch is, that a position is exact, how sources split and shuffle, and what is said of bad input.

Tasks, examples and their labels have a file of their own: test_tasks.py.
"""

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from wrinklefree.config.groups import CONFIGS
from wrinklefree.config.schema import DataConfig
from wrinklefree.core.batch import IGNORE
from wrinklefree.core.errors import UserError
from wrinklefree.data import packing, sources
from wrinklefree.data.chat import Reading
from wrinklefree.data.open import _refuse_unread, _render, file_batches, heldout_batches, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.tokenizer import train_tokenizer

WORDS = [f"word{i} is the {i * i}th of many words, and {i}\n" for i in range(97)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(WORDS, vocab_size=400)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """97 documents, in a JSONL file, an array, a Parquet file and two text files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    rows = [{"text": word, "number": i} for i, word in enumerate(WORDS)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]))
    (folder / "b.json").write_text(json.dumps(rows[40:60]))
    pq.write_table(pa.Table.from_pylist(rows[60:95]), folder / "c.parquet")
    (folder / "d.txt").write_text(WORDS[95])
    (folder / "deep" / "e.md").write_text(WORDS[96])
    (folder / ".hidden.txt").write_text("never read")
    (folder / "ignored.bin").write_bytes(b"\xff")
    return folder


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    """A dataset of three shards as `load_dataset` knows it: the hub's code path without the hub."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for shard in range(3):
        rows = [json.dumps({"text": f"shard {shard} row {i}"}) + "\n" for i in range(250)]
        (folder / f"train-{shard}.jsonl").write_text("".join(rows))
    return folder


def stream(config: DataConfig, tokenizer: PreTrainedTokenizerFast, **kwargs: int) -> BatchStream:
    return training_stream(config, tokenizer, **{"batch_size": 2, "length": 32, "seed": 5} | kwargs)


def take(batches: BatchStream, count: int) -> torch.Tensor:
    """Everything in the next batches, [count, 3, batch, length]."""
    return torch.stack([torch.stack(list(next(batches).values())) for _ in range(count)])


def documents_of_epoch(config: DataConfig, tokenizer: PreTrainedTokenizerFast, **kwargs: int) -> list[str]:
    """The texts of the first epoch that a stream shows, in its order."""
    batches = stream(config, tokenizer, batch_size=1, length=8, **kwargs)
    ids: list[int] = []
    while batches.state_dict()["epoch"] == 0:
        ids += next(batches)["input_ids"][0].tolist()
    return tokenizer.decode(ids).split("<|endoftext|>")[:-1]


def blocks(*documents: list[int], length: int) -> torch.Tensor:
    return packing.pack([packing._document([*ids, 0], prompt=0) for ids in documents], length, pad=0)


def test_batch_is_documents_end_to_end() -> None:
    batch = packing.make_batch(blocks([1, 2, 3], [4, 5], [6], length=10)[:, :, :9])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 4, 5, 0, 6, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3, 0, IGNORE, 5, 0, IGNORE, 0]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_without_document_mask_positions_run_through_and_borders_stay_unpredicted() -> None:
    batch = packing.make_batch(blocks([1, 2, 3], [4, 5], length=7), document_mask=False)
    assert batch["position_ids"].tolist() == [list(range(7))]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3, 0, IGNORE, 5, 0]]


def test_positions_of_a_cut_document_restart_with_the_block() -> None:
    batch = packing.make_batch(blocks([1, 2, 3, 4, 5], length=3))
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 3], [4, 5, 0]]


@pytest.mark.parametrize("length", [3, 6, 7, 20])
def test_partial_block_is_dropped_unless_it_is_the_only_one(length: int) -> None:
    packed = packing.make_batch(blocks([1, 2, 3], [4, 5], length=length))
    assert packed["input_ids"].shape == (max(1, 7 // length), length)
    padding = packed["labels"][0, 7:]
    assert (padding == IGNORE).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_give_the_logits_of_documents_alone(attention: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()
    documents = [[1, 2, 3, 4], [5], [6, 7, 8, 9, 10]]
    batch = packing.make_batch(blocks(*documents, length=13))
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=torch.tensor([[*ids, 0]]), use_cache=False).logits for ids in documents]
        joined = model(input_ids=batch["input_ids"], use_cache=False).logits
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
    assert (joined - packed).abs().max() > 1e-3  # the documents would see each other


def test_spread_takes_blocks_from_the_whole_range() -> None:
    numbered = torch.arange(100).view(100, 1, 1).expand(100, 2, 10)
    kept = packing.spread(numbered, max_tokens=40)[:, 0, 0].tolist()
    assert kept == [12, 37, 62, 87]
    assert len(packing.spread(numbered, max_tokens=1)) == 1
    assert len(packing.spread(numbered, max_tokens=None)) == 100


@pytest.mark.parametrize(
    ("source", "before"),
    [("stdlib", 45), *((source, before) for source in ("local", "hub") for before in (0, 1, 45))],
)
def test_resume_is_exact(
    source: str, before: int, corpus: Path, hub_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    paths = {"stdlib": None, "local": str(corpus), "hub": str(hub_folder)}
    config = DataConfig(source=source, path=paths[source], shuffle_buffer=7 if source != "stdlib" else 2048)
    whole = stream(config, tokenizer)
    take(whole, before) if before else None
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    expected = take(whole, 60)
    saved.seek(0)
    resumed = stream(config, tokenizer)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(take(resumed, 60), expected)


def test_resume_tests_cross_chunks_and_epochs(
    corpus: Path, hub_folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """What `test_resume_is_exact` promises is worth something only if its runs leave the first chunk and epoch."""
    local = stream(DataConfig(source="local", path=str(corpus), shuffle_buffer=7), tokenizer)
    take(local, 45)
    assert local.state_dict()["chunk"] > 0
    take(local, 60)
    assert local.state_dict()["epoch"] > 0
    hub = stream(DataConfig(source="hub", path=str(hub_folder), shuffle_buffer=7), tokenizer)
    take(hub, 45)
    assert hub.state_dict()["chunk"] > 0
    take(hub, 60)
    assert hub.state_dict()["epoch"] > 0


def test_a_stream_can_go_back_to_a_position_of_its_own(hub_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    batches = stream(DataConfig(source="hub", path=str(hub_folder), shuffle_buffer=7), tokenizer)
    start = batches.state_dict()
    first = take(batches, 10)
    batches.load_state_dict(start)
    assert torch.equal(take(batches, 10), first)


def test_position_outlives_a_change_of_batch_and_length(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="local", path=str(corpus))
    batches = stream(config, tokenizer, batch_size=1, length=64)
    next(batches)
    resumed = stream(config, tokenizer, batch_size=2, length=32)
    resumed.load_state_dict(batches.state_dict())
    assert next(batches)["input_ids"].flatten().tolist() == next(resumed)["input_ids"].flatten().tolist()


def test_resume_under_another_seed_is_refused(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="local", path=str(corpus))
    state = stream(config, tokenizer, seed=1).state_dict()
    with pytest.raises(UserError, match="saved with seed=1, this run has 2"):
        stream(config, tokenizer, seed=2).load_state_dict(state)


@pytest.mark.parametrize("shuffle_buffer", [1, 10, 2048])
def test_an_epoch_has_every_document_once_and_none_held_out(
    shuffle_buffer: int, corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = DataConfig(source="local", path=str(corpus), shuffle_buffer=shuffle_buffer)
    heldout = heldout_batches(config, tokenizer, batch_size=1, length=8)
    shown = tokenizer.decode([i for batch in heldout for i in batch["input_ids"][0].tolist()])
    assert sorted(documents_of_epoch(config, tokenizer)) == sorted(w for i, w in enumerate(WORDS) if i % 20)
    assert "".join(WORDS[::20]).startswith(shown.replace("<|endoftext|>", ""))


def test_epochs_and_seeds_differ_in_order_only(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="local", path=str(corpus))
    first, second = (documents_of_epoch(config, tokenizer, seed=seed) for seed in (1, 2))
    assert first != second
    assert sorted(first) == sorted(second)
    assert documents_of_epoch(config, tokenizer, seed=1) == first
    batches = stream(config, tokenizer, batch_size=1, length=8)
    opening = next(batches)["input_ids"]
    batches.load_state_dict(batches.state_dict() | {"epoch": 1, "document": 0, "offset": 0})
    assert not torch.equal(next(batches)["input_ids"], opening)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 3), (3, 2), (6, 1)])
def test_processes_share_the_batches_of_one(
    world_size: int, batch_size: int, corpus: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = DataConfig(source="local", path=str(corpus), shuffle_buffer=10)
    one = take(stream(config, tokenizer, batch_size=6), 30)
    ranks = [
        stream(config, tokenizer, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    assert torch.equal(torch.cat([take(batches, 30) for batches in ranks], dim=2), one)
    states = [batches.state_dict() for batches in ranks]
    assert all(state == states[0] for state in states)
    assert not {"rank", "world_size"} & states[0].keys()


def test_a_position_of_two_processes_is_one_for_any_number(corpus: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="local", path=str(corpus), shuffle_buffer=10)
    second = stream(config, tokenizer, batch_size=2, rank=1, world_size=2)
    take(second, 25)
    one, third = stream(config, tokenizer, batch_size=6), stream(config, tokenizer, rank=2, world_size=3)
    one.load_state_dict(second.state_dict())
    third.load_state_dict(second.state_dict())
    assert torch.equal(take(third, 40), take(one, 40)[:, :, 4:])


def test_more_processes_than_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    batches = stream(DataConfig(source="local", path=str(tmp_path)), tokenizer, length=8, rank=3, world_size=4)
    assert tokenizer.decode(next(batches)["input_ids"][0]).count("two<|endoftext|>") >= 1


def test_stdlib_heldout_is_cut_evenly_and_the_same_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="stdlib")
    whole, again = (
        torch.cat([b["input_ids"] for b in heldout_batches(config, tokenizer, batch_size=8, length=128)])
        for _ in range(2)
    )
    assert torch.equal(whole, again)
    cut = heldout_batches(config, tokenizer, batch_size=4, length=128, max_tokens=10 * 128)
    assert [len(batch["labels"]) for batch in cut] == [4, 4, 2]
    total = len(whole)
    assert torch.equal(torch.cat([b["input_ids"] for b in cut]), whole[[(2 * i + 1) * total // 20 for i in range(10)]])


def test_named_heldout_file_leaves_training_whole(
    corpus: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    heldout = tmp_path / "heldout.txt"
    heldout.write_text("only this")
    config = DataConfig(source="local", path=str(corpus), heldout_path=str(heldout))
    batches = heldout_batches(config, tokenizer, batch_size=1, length=64)
    assert tokenizer.decode(batches[0]["input_ids"][0]).startswith("only this<|endoftext|>")
    assert sorted(documents_of_epoch(config, tokenizer)) == sorted(WORDS)


def test_hub_holds_out_its_first_documents(hub_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = DataConfig(source="hub", path=str(hub_folder))
    trained = documents_of_epoch(config, tokenizer)
    rows = [f"shard {shard} row {i}" for shard in range(3) for i in range(250)]
    assert sorted(trained) == sorted(rows[sources.HELDOUT_DOCUMENTS :])
    heldout = heldout_batches(config, tokenizer, batch_size=100, length=16)
    shown = tokenizer.decode(torch.cat([b["input_ids"].flatten() for b in heldout])).split("<|endoftext|>")[:-1]
    assert shown == rows[: len(shown)]
    assert len(shown) > sources.HELDOUT_DOCUMENTS - 10


def test_a_book_in_one_file_is_shuffled_and_held_out_in_parts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    book = tmp_path / "book.rst"  # a file named outright is text, whatever its suffix
    book.write_text("".join(WORDS))
    render = _render("plain", Reading(tokenizer))
    parts = list(sources.read_documents(book, render, piece=100))
    assert "".join(parts) == "".join(WORDS)
    assert len(parts) > 20
    assert all(part.endswith("\n") for part in parts)


def test_evaluated_text_file_is_one_document(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "PIECE", 100)
    (tmp_path / "a.txt").write_text("".join(WORDS))
    batches = file_batches(tmp_path / "a.txt", tokenizer, batch_size=4, length=64)
    labels = torch.cat([batch["labels"] for batch in batches])
    assert (labels == IGNORE).sum() == 1
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in WORDS))
    labels = torch.cat([b["labels"] for b in file_batches(tmp_path / "a.jsonl", tokenizer, batch_size=4, length=8)])
    assert (labels == IGNORE).sum() == len(WORDS)


def test_chat_rows_are_written_by_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row) + "\n")
    batches = file_batches(tmp_path / "chat.jsonl", tokenizer, batch_size=1, length=100)
    text = tokenizer.decode(batches[0]["input_ids"][0])
    assert text.startswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n<|endoftext|>")


def test_begin_and_end_of_sequence_are_written_once() -> None:
    tokenizer = train_tokenizer(WORDS, vocab_size=400)
    tokenizer.bos_token = tokenizer.eos_token
    begin, text = tokenizer.bos_token or "", "word1"
    alone = tokenizer(text)["input_ids"]
    encoded = packing.encode(tokenizer, [begin + begin + text, begin + text + begin, text])
    assert [document[0].tolist() for document in encoded] == [[0, *alone, 0], [0, *alone, 0], [*alone, 0]]


def test_empty_rows_are_no_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = ["", "held out", " \n", "first", None, "second"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n\n" for row in rows))
    config = DataConfig(source="local", path=str(tmp_path))
    assert sorted(documents_of_epoch(config, tokenizer)) == ["first", "second"]


def test_every_data_yaml_is_a_data_config() -> None:
    from omegaconf import OmegaConf

    found = {path.stem: DataConfig(**OmegaConf.load(path)) for path in (CONFIGS / "data").glob("*.yaml")}
    assert {"stdlib", "local", "hub", "fineweb", "fineweb_edu", "downstream"} <= set(found)
    for name, config in found.items():
        if name != "self":  # nobody has written it yet, and that is what it says
            _refuse_unread(config)


BAD_FILES = {
    "empty.jsonl": (b"", "no text to train on"),
    "blank.txt": (b" \n\n ", "no text to train on"),
    "single.txt": (b"one document", "first document is held out.*data.heldout_path"),
    "column.jsonl": (b'{"question": "a", "answer": "b"}', "row 1: no column 'text'.*one of: question, answer"),
    "number.jsonl": (b'{"text": 3}', "row 1: column 'text' holds int"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": oops}', "line 2: not JSON"),
    "list.jsonl": (b'["a"]', "line 1: not an object"),
    "broken.json": (b'[{"text": "a"}', "not JSON"),
    "latin.txt": ("café\n".encode("latin1"), "not UTF-8.*iconv"),
    "latin.jsonl": ('{"text": "café"}'.encode("latin1"), "not UTF-8.*iconv"),
    "broken.parquet": (b"PAR1 and no more", "not a whole Parquet file"),
    "chat.jsonl": (b'{"messages": 3}', "row 1: messages must be a list"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_one_line_naming_it(name: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        next(stream(DataConfig(source="local", path=str(tmp_path / name)), tokenizer))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


BAD_SETTINGS = [
    (DataConfig(source="local"), "data.path: a value is required"),
    (DataConfig(source="hub"), "data.path: a value is required"),
    (DataConfig(source="local", path="no/such"), "data.path=no/such: no such file or folder"),
    (DataConfig(source="stdlib", path="x"), "data.path=x has no effect with data.source=stdlib"),
    (DataConfig(source="local", path="x", split="dev"), "data.split=dev has no effect with data.source=local"),
]


@pytest.mark.parametrize(("config", "message"), BAD_SETTINGS)
def test_bad_setting_is_said_before_anything_is_read(
    config: DataConfig, message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match=message):
        stream(config, tokenizer)
    with pytest.raises(UserError, match=message):
        heldout_batches(config, tokenizer, batch_size=1, length=8)


def test_folder_without_readable_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"no file here ends in \.txt"):
        stream(DataConfig(source="local", path=str(tmp_path)), tokenizer)


def test_unreachable_hub_is_said_with_a_way_out(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    config = DataConfig(source="hub", path="someone/something")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: use data=stdlib, or data=local"):
        stream(config, tokenizer)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9 does not answer: use data=stdlib"):
        stream(config, tokenizer)


def test_unknown_split_of_a_dataset(hub_folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.split=nope") as caught:
        stream(DataConfig(source="hub", path=str(hub_folder), split="nope"), tokenizer)
    assert "\n" not in str(caught.value)


def test_tokenizer_without_end_of_sequence(tokenizer: PreTrainedTokenizerFast, corpus: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no eos_token"):
        next(stream(DataConfig(source="local", path=str(corpus)), bare))
