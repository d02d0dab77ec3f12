"""Rows of every chat format become the conversations that they are, with thoughts, masks and exact positions."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conversing import ALPACA, chatty
from kd_caches import take
from tiny import tokenizer

from wrinklefree.commands import cache as command
from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import DATA_FORMATS, find_named
from wrinklefree.data import chat, sources
from wrinklefree.data.open import heldout_batches, training_stream

DOLLY = {"instruction": "Add.", "context": "1 2", "response": "3"}
TURNS = [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
ROLES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA"}]


def said(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def document(format: str, row: dict[str, Any], thinking: chat.Thinking = False, mask_prompt: bool = False) -> Any:
    return find_named(DATA_FORMATS, format)(row, chat.Reading(chatty(), "text", thinking, mask_prompt), "row 1")


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("alpaca_chat", ALPACA, said("user", "Add.\n\n1 2") + said("assistant", "3")),
        ("alpaca_chat", ALPACA | {"input": ""}, said("user", "Add.") + said("assistant", "3")),
        ("dolly", DOLLY, said("user", "Add.\n\nContext:\n1 2") + said("assistant", "3")),
        ("openhermes", {"conversations": TURNS}, said("system", "S") + said("user", "Q") + said("assistant", "A")),
        ("sharegpt", {"dialog": ROLES}, said("user", "Q") + said("assistant", "A")),
        ("sharegpt", {"messages": ROLES[:1]}, ""),
    ],
)
def test_rows_become_conversations(format: str, row: dict[str, Any], expected: str) -> None:
    assert document(format, row, False, False) == expected


def test_thinking_is_written_left_out_or_bare() -> None:
    row = {"messages": ROLES}
    texts = [document("sharegpt", row, kind, False) for kind in (True, False, None)]
    thought = ROLES[1]["content"]
    assert texts == [
        said("user", "Q") + said("assistant", thought),
        said("user", "Q") + said("assistant", "A"),
        f"Q\n\n{thought}",
    ]


def test_a_masked_prompt_is_all_but_the_last_answer() -> None:
    found = document("alpaca_chat", ALPACA, False, True)
    assert found == sources.Example(said("user", "Add.\n\n1 2") + "<|im_start|>assistant\n", "3<|im_end|>\n")


def test_an_answer_without_a_question_has_no_prompt() -> None:
    found = document("sharegpt", {"messages": ROLES[1:]}, False, True)
    assert found == sources.Example("", said("assistant", "A"))


@pytest.mark.parametrize("line", ['{"text": ', '{"text": ' + 5000 * "9" + "}", 100_000 * "["])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_lines_that_are_no_json_are_named(tmp_path: Path, line: str, name: str) -> None:
    (tmp_path / name).write_text('{"text": "some"}\n' * 2 + line if name == "rows.jsonl" else "[" + line + "]")
    with pytest.raises(UserError, match=f"{name}(, line 3)?: not JSON") as error:
        list(sources.read_documents(tmp_path / name, lambda row, where: str(row)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("alpaca_chat", DOLLY, "row 1: no text in 'output'; there are instruction, context, response"),
        ("openhermes", {"conversations": "x"}, "row 1: no list in conversations"),
        ("openhermes", {"conversations": ["x"]}, "row 1: a turn is str"),
        ("sharegpt", {"messages": [{"role": "judge", "content": "x"}]}, "row 1: a turn of role 'judge'"),
        ("sharegpt", {"messages": [{"role": ["user"], "content": "x"}]}, r"row 1: a turn of role \['user'\]"),
    ],
)
def test_a_row_of_another_format_is_named(format: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        document(format, row, False, False)


@pytest.fixture
def conversations(tmp_path: Path) -> DataConfig:
    """60 conversations; every third has a thought."""
    lines = []
    for number in range(60):
        thought = "<think>\nhm\n</think>\n\n" * (number % 3 == 0)
        turns = [{"from": "human", "value": f"Q{number}"}, {"from": "gpt", "value": f"{thought}A{number}"}]
        lines.append(json.dumps({"conversations": turns}))
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    return DataConfig(source="local", path=str(tmp_path / "chat.jsonl"), format="openhermes", enable_thinking="both")


def one_epoch(config: DataConfig) -> list[str]:
    stream = training_stream(config, chatty(), batch_size=1, length=8, seed=1)
    ids: list[int] = []
    while stream.state_dict()["epoch"] == 0:
        ids += next(stream)["input_ids"][0].tolist()
    return chatty().decode(ids).split("<|endoftext|>")[:-1]


def test_both_gives_each_conversation_twice_where_that_differs(conversations: DataConfig) -> None:
    """3 of 60 conversations are held out, with both of their texts."""
    texts = one_epoch(conversations)
    held = heldout_batches(conversations, chatty(), batch_size=64, length=8)
    answers = {f"A{i}<" for i in range(60)}
    trained = {a for a in answers if any(a in text for text in texts)}
    kept_out = chatty().decode(torch.cat([b["input_ids"] for b in held]).flatten().tolist())
    assert {a for a in answers if a in kept_out} <= answers - trained
    assert len(trained) == 57
    assert len(set(texts)) == 57 + 19  # of the 20 with a thought one is held out


@pytest.mark.parametrize("before", [0, 1, 7, 60])
def test_a_position_between_two_texts_of_a_conversation_is_exact(conversations: DataConfig, before: int) -> None:
    config = dataclasses.replace(conversations, shuffle_buffer=7)
    make_stream = partial(training_stream, config, chatty(), batch_size=1, length=8, seed=1)
    whole, first, other = make_stream(), make_stream(), make_stream()
    expected = take(whole, before + 40)[before:]
    take(first, before)
    other.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert all(torch.equal(a, b) for a, b in zip(take(other, 40), expected, strict=True))


@pytest.mark.parametrize("setting", ["enable_thinking=both", "mask_prompt=true"])
def test_settings_of_conversations_mean_nothing_to_plain_text(folder: Path, setting: str) -> None:
    config = command.settings(str(folder / "toy"), 16, ["data=local", f"data.path={folder}/text", f"data.{setting}"])
    with pytest.raises(UserError, match=r"has no effect with data.format=plain"):
        training_stream(config.data, tokenizer(), batch_size=1, length=8, seed=1)
