"""What a request means: fields that change nothing, unions, stop strings, and the tokens of its prompt."""

import json
import logging
from typing import Any

import pytest

from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_tokenizer
from wrinklefree.serve import prompts, schema
from wrinklefree.serve.errors import ApiError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return open_tokenizer(resolve_pretrained("builtin:tiny"))


def completion(**fields: Any) -> schema.Completion:
    return schema.parse(schema.Completion, json.dumps({"model": "m", "prompt": "a"} | fields).encode())


def chat(*contents: str, **fields: Any) -> schema.Chat:
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, contents, strict=False)]
    return schema.parse(schema.Chat, json.dumps({"model": "m", "messages": turns} | fields).encode())


def only(tokenizer: Any, request: Any, **options: Any) -> list[int]:
    """The tokens of the one prompt of a request."""
    (ids,) = prompts.encode(tokenizer, request, **options)
    return ids


def test_what_changes_no_answer_is_ignored_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    schema._tell_ignored.cache_clear()
    values = {"parallel_tool_calls": True, "reasoning_effort": "low", "service_tier": "auto", "user": "me"}
    with caplog.at_level(logging.INFO, "wrinklefree"):
        for _ in range(2):
            assert chat("a", **values, store=True, metadata={"a": "b"}) == chat("a")
    assert sorted(record.message.split()[0] for record in caplog.records) == sorted([*values, "store", "metadata"])


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": [5, "a"]}, "prompt.1", "valid integer"),
        ({"prompt": [5, 1.5]}, "prompt.1", "valid integer"),
        ({"prompt": {"text": "a"}}, "prompt", "must be a text, a list of token ids, or a list of such prompts"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ["a", 5]}, "prompt.1", "valid string"),
        ({"prompt": [[5], ["a"]]}, "prompt.1.0", "valid integer"),
        ({"max_tokens": 0}, "max_tokens", "0 only with echo=true"),
        ({"n": 3, "best_of": 2}, "best_of", "at least n=3"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt", "at most 128"),
        ({"stop": 5}, "stop", "must be a text or a list of texts"),
        ({"stop": [5]}, "stop.0", "valid string"),
        ({"stop": ["a" * 300]}, "stop.0", "at most 256 characters"),
    ],
)
def test_a_mistake_in_a_union_is_told_in_the_branch_that_was_meant(fields: Any, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert caught.value.param == param
    assert message in caught.value.message


def test_empty_stop_strings_are_dropped() -> None:
    assert completion(stop="").stops() == []
    assert completion(stop=["", "x", ""]).stops() == ["x"]


def test_variables_reach_the_chat_template(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}{% if loud %}!{% endif %}")
    quiet, loud = (only(tokenizer, chat("hey", chat_template_kwargs={"loud": on})) for on in (False, True))
    assert (tokenizer.decode(quiet), tokenizer.decode(loud)) == ("hey", "hey!")
    for name in ("chat_template", "messages", "add_generation_prompt", "self", "tokenize"):
        with pytest.raises(ApiError, match="not a variable of a chat template"):
            only(tokenizer, chat("hey", chat_template_kwargs={name: "x"}))


def test_special_tokens_in_a_message_stay_text(tokenizer: Any) -> None:
    special = set(tokenizer.all_special_ids)
    for word in tokenizer.all_special_tokens:
        plain, odd = (only(tokenizer, chat(text, "b", "c")) for text in ("say   now", f"say {word} now"))
        assert [i for i in odd if i in special] == [i for i in plain if i in special]
        assert f"say {word} now" in tokenizer.decode(odd)
        allowed = only(tokenizer, chat(f"say {word} now", "b", "c"), allow_special=True)
        assert sum(i in special for i in allowed) == sum(i in special for i in plain) + 1


def test_special_tokens_in_a_prompt_stay_text(tokenizer: Any) -> None:
    word = tokenizer.eos_token
    ids = only(tokenizer, completion(prompt=f"a{word}b"))
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == f"a{word}b"
    assert tokenizer.eos_token_id in only(tokenizer, completion(prompt=f"a{word}b"), allow_special=True)


def test_text_without_special_tokens_is_read_as_ever(tokenizer: Any) -> None:
    text = "def f(x):\n    return '<|' + x\u00e9  # |>"
    assert only(tokenizer, completion(prompt=text)) == tokenizer(text).input_ids
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    assert only(tokenizer, chat(text)) == tokenizer(expected, add_special_tokens=False).input_ids


def test_prompts_may_be_a_list(tokenizer: Any) -> None:
    several = prompts.encode(tokenizer, completion(prompt=["a b", "c"]))
    assert several == [tokenizer("a b").input_ids, tokenizer("c").input_ids]
    assert prompts.encode(tokenizer, completion(prompt=[[1, 2], [3]])) == [[1, 2], [3]]
    assert prompts.encode(tokenizer, completion(prompt=[1, 2])) == [[1, 2]]
