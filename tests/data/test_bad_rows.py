"""A bad row is named or left out, the stream before and after it is whole, and rows of every kind become documents."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversing import chatty
from transformers import PreTrainedTokenizerFast

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, find_named
from wrinklefree.data import chat, sources
from wrinklefree.data.open import heldout_batches, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.rows import BadRowError
from wrinklefree.data.tokenizer import train_tokenizer

GOOD = [f"document {i} has a few words of its own" for i in range(200)]
LATE = 150  # the row before which the bad one stands


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(GOOD, vocab_size=300)


def write(path: Path, *bad: str) -> Path:
    """200 rows, of which those numbered from LATE on come after the `bad` ones."""
    rows = [json.dumps({"text": text}) for text in GOOD]
    path.write_text("\n".join([*rows[:LATE], *bad, *rows[LATE:]]) + "\n")
    return path


def stream(path: Path, tokenizer: Any, **values: Any) -> BatchStream:
    config = DataConfig(source="local", path=str(path), **({"shuffle_buffer": 16} | values))
    return training_stream(config, tokenizer, batch_size=2, length=24, seed=3)


def until_bad(batches: BatchStream) -> list[torch.Tensor]:
    """The batches before the first bad row."""
    given = []
    try:
        for batch in batches:
            given.append(batch["input_ids"])
    except BadRowError:
        return given
    pytest.fail("no bad row")


def reloaded(state: dict[str, Any]) -> dict[str, Any]:
    saved = io.BytesIO()
    torch.save(state, saved)
    saved.seek(0)
    loaded: dict[str, Any] = torch.load(saved, weights_only=True)
    return loaded


def test_a_bad_row_is_named_with_what_to_do(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": 3}')
    batches = stream(path, tokenizer)
    until_bad(batches)
    with pytest.raises(UserError, match=r"a\.jsonl, row 151: column 'text' holds int, not text.*data\.bad_rows=skip"):
        next(batches)  # it is still there


def test_a_mended_row_is_read_and_no_other_is_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    mended = json.dumps({"text": "it was mended"})
    whole = stream(write(tmp_path / "good.jsonl", mended), tokenizer)
    path = write(tmp_path / "a.jsonl", "{oops")
    broken = stream(path, tokenizer)
    given = until_bad(broken)
    assert given
    expected = [next(whole)["input_ids"] for _ in range(len(given) + 60)]
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=False))
    write(path, mended)
    with pytest.raises(UserError, match=r"saved with data\.path=a\.jsonl \(\d+ bytes.*data\.allow_changes=true"):
        stream(path, tokenizer).load_state_dict(reloaded(broken.state_dict()))
    resumed = stream(path, tokenizer, allow_changes=True)
    resumed.load_state_dict(reloaded(broken.state_dict()))
    assert all(torch.equal(next(resumed)["input_ids"], batch) for batch in expected[len(given) :])


def test_a_run_that_ended_at_a_bad_row_goes_on_without_it(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", "{oops")
    broken = stream(path, tokenizer)
    given = until_bad(broken)
    whole = stream(path, tokenizer, bad_rows="skip")
    expected = [next(whole)["input_ids"] for _ in range(len(given) + 60)]
    resumed = stream(path, tokenizer, bad_rows="skip")
    resumed.load_state_dict(reloaded(broken.state_dict()))
    assert all(torch.equal(next(resumed)["input_ids"], batch) for batch in expected[len(given) :])
    assert resumed.skipped == 1


def test_skipped_rows_are_said_once_and_counted_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, said: list[str]
) -> None:
    path = write(tmp_path / "a.jsonl", "{oops", '{"other": "x"}', '"text"', '{"text": ["x"]}')
    batches = stream(path, tokenizer, bad_rows="skip")
    seen: list[int] = []
    while batches.state_dict()["epoch"] < 2:
        seen += next(batches)["input_ids"].flatten().tolist()
    assert batches.skipped == 4
    assert said == [
        f"data.bad_rows=skip: leaves out {path}, line 151: not JSON: "
        "Expecting property name enclosed in double quotes at column 2"
    ]
    texts = set(tokenizer.decode(seen).split("<|endoftext|>"))
    assert len(texts & set(GOOD)) == 189  # every 20th of 204 rows is held out, and none of the bad ones


@pytest.mark.parametrize("before", [0, 1, 30, 75, 120])
def test_a_position_among_skipped_rows_is_exact(
    before: int, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", "{oops", "{oops")
    whole = stream(path, tokenizer, bad_rows="skip")
    for _ in range(before):
        next(whole)
    resumed = stream(path, tokenizer, bad_rows="skip")
    resumed.load_state_dict(reloaded(whole.state_dict()))
    for _ in range(60):
        assert torch.equal(next(resumed)["input_ids"], next(whole)["input_ids"])
    assert resumed.skipped == whole.skipped


def test_nothing_but_bad_rows_is_no_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text("{oops\n" * 50)
    with pytest.raises(UserError, match="no text to train on"):
        next(stream(tmp_path / "a.jsonl", tokenizer, bad_rows="skip"))


def test_held_out_rows_follow_the_same_rule(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", "{oops")
    good = write(tmp_path / "good.jsonl", '{"text": "instead"}')
    config = DataConfig(source="local", path=str(path))
    with pytest.raises(BadRowError, match="line 151: not JSON"):
        heldout_batches(config, tokenizer, batch_size=2, length=24)
    config.bad_rows = "skip"
    held = heldout_batches(config, tokenizer, batch_size=2, length=24)
    other = heldout_batches(DataConfig(source="local", path=str(good)), tokenizer, batch_size=2, length=24)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(held, other, strict=True))


def test_a_row_that_one_of_several_texts_cannot_have_is_left_out_of_all(tmp_path: Path) -> None:
    tokenizer = chatty()
    tokenizer.chat_template = "{% for m in messages %}{% if m.content == 'Q7' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template += "{{ m.role }}: {{ m.content }} {{ enable_thinking }}\n{% endfor %}"
    turns = [[{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": f"A{i}"}] for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    values = {"format": "openhermes", "enable_thinking": "all"}
    refused = stream(tmp_path / "a.jsonl", tokenizer, **values)
    until_bad(refused)
    with pytest.raises(BadRowError, match=r"row 8: .*the chat template says: no"):
        next(refused)
    batches = stream(tmp_path / "a.jsonl", tokenizer, bad_rows="skip", **values)
    seen: list[int] = []
    while not batches.state_dict()["epoch"]:
        seen += next(batches)["input_ids"].flatten().tolist()
    assert batches.skipped == 1
    assert not any("Q7" in text for text in tokenizer.decode(seen).split("<|endoftext|>"))
    assert len(set(tokenizer.decode(seen).split("<|endoftext|>")) & {f"Q{i}\n\nA{i}" for i in range(40)}) == 37


# Conversations


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def conversation(*turns: dict[str, Any], format: str = "sharegpt", tokenizer: Any = None) -> Any:
    reading = chat.Reading(tokenizer or chatty(), "text")
    return find_named(DATA_FORMATS, format)({"messages": list(turns)}, reading, "row 1")


ANSWER = {"role": "assistant", "content": "A"}
QUESTION = {"role": "user", "content": "Q"}


@pytest.mark.parametrize("format", ["plain", "sharegpt"])
@pytest.mark.parametrize(
    ("role", "written"),
    [
        *(("User", "user"), ("HUMAN", "user"), (" user ", "user"), ("Assistant", "assistant"), ("gpt", "assistant")),
        *(("developer", "system"), ("System", "system")),
        *(("tool", "tool"), ("function", "tool"), ("observation", "tool"), ("Tool", "tool")),
    ],
)
def test_roles_are_those_of_the_template(role: str, written: str, format: str) -> None:
    text = conversation({"role": role, "content": "T"}, QUESTION, ANSWER, format=format)
    assert text == turn(written, "T") + turn("user", "Q") + turn("assistant", "A")


def test_a_role_has_the_name_that_the_template_knows() -> None:
    tokenizer = chatty()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ['developer', 'observation', 'user', 'assistant'] %}"
        "{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
    )
    turns = [{"role": role, "content": role} for role in ("developer", "user", "function", "assistant")]
    text = conversation(*turns, tokenizer=tokenizer)
    assert text == "developer: developer\nuser: user\nobservation: function\nassistant: assistant\n"


def test_what_a_tool_said_is_never_left_out_in_silence() -> None:
    tokenizer = chatty()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="row 1: a turn of role 'tool', which the chat template leaves out"):
        conversation(QUESTION, {"role": "tool", "content": "4"}, ANSWER, tokenizer=tokenizer)


@pytest.mark.parametrize("format", ["plain", "sharegpt"])
def test_content_may_be_null_or_in_parts(format: str) -> None:
    parts = [{"type": "text", "text": "Q1 "}, {"type": "text", "text": "Q2"}, " Q3"]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, QUESTION, ANSWER]
    expected = turn("user", "Q1 Q2 Q3") + turn("assistant", "") + turn("user", "Q") + turn("assistant", "A")
    assert conversation(*turns, format=format) == expected


def test_calls_of_tools_reach_the_template() -> None:
    tokenizer = chatty()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.name }}{% endfor %};{% endfor %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    text = conversation(QUESTION, call, {"role": "tool", "content": "4"}, ANSWER, tokenizer=tokenizer)
    assert text == "userQ;assistantadd;tool4;assistantA;"


@pytest.mark.parametrize("format", ["plain", "sharegpt", "openhermes"])
@pytest.mark.parametrize("empty", [[], None])
def test_an_empty_conversation_is_no_document(format: str, empty: Any) -> None:
    row = {"messages": empty, "conversations": empty}
    assert sources.is_blank(find_named(DATA_FORMATS, format)(row, chat.Reading(chatty()), "row 1"))


@pytest.mark.parametrize("format", ["plain", "sharegpt"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"role": "judge", "content": "x"}, "a turn of role 'judge'; roles: user, human"),
        ({"content": "x"}, "a turn of role None"),
        ({"role": "user", "content": 3}, "the content of role 'user' is int, not text"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part that is no text but 'image_url'"),
        ({"role": "user", "content": [[1]]}, "a part that is no text but 'list'"),
        ("hello", "a turn is str"),
    ],
)
def test_what_is_no_conversation_is_a_bad_row(given: Any, message: str, format: str) -> None:
    with pytest.raises(UserError, match=f"row 1: .*{message}"):
        conversation(given, ANSWER, format=format)


@pytest.mark.parametrize(
    "template", ["{{ messages[9].content }}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ raise_exception('x') }}"]
)
def test_whatever_a_template_raises_is_a_bad_row(template: str) -> None:
    tokenizer = chatty()
    tokenizer.chat_template = "{{ " + template + " }}"
    with pytest.raises(UserError, match=r"row 1: .*the chat template says"):
        conversation(QUESTION, ANSWER, tokenizer=tokenizer)


@pytest.mark.parametrize(
    "row", ['{"text": "cut \\ud83d off"}', '{"messages": [{"role": "user", "content": "cut \\ud83d off"}]}']
)
def test_half_of_a_surrogate_pair_is_replaced(row: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(row + "\n" + json.dumps({"text": "other"}) + "\n")
    config = DataConfig(source="local", path=str(tmp_path / "a.jsonl"), heldout_path=str(tmp_path / "a.jsonl"))
    batch = next(training_stream(config, chatty(), batch_size=1, length=64, seed=0))
    assert "cut \ufffd off" in chatty().decode(batch["input_ids"][0])


def test_an_alpaca_file_is_told_its_format(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text('{"instruction": "Add.", "input": "1 2", "output": "3"}\n')
    with pytest.raises(UserError, match=r"row 1: no column 'text'; set data\.format=alpaca_chat, or set"):
        next(stream(tmp_path / "a.jsonl", tokenizer))


def test_a_bad_row_of_a_dataset_is_one_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": text} for text in GOOD] + [{"text": None, "messages": None}]
    rows[20] = {"text": None, "messages": [{"role": "judge", "content": "x"}]}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"source": "hub", "path": str(tmp_path), "heldout_split": "train", "format": "sharegpt"}
    make = {"batch_size": 2, "length": 24, "seed": 3}
    with pytest.raises(BadRowError, match="row 21: a turn of role 'judge'"):
        next(training_stream(DataConfig(**values), tokenizer, **make))


@pytest.mark.parametrize("bad_rows", ["error", "skip"])
def test_what_is_wrong_with_every_row_is_not_skipped(bad_rows: str, tmp_path: Path) -> None:
    silent = chatty()
    silent.chat_template = None
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [QUESTION, ANSWER]}) + "\n")
    with pytest.raises(UserError, match=r"row 1: tokenizer .* has no chat template") as caught:
        next(stream(tmp_path / "a.jsonl", silent, bad_rows=bad_rows))
    assert "bad_rows" not in str(caught.value)
