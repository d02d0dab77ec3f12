"""Text that a model writes itself: the same however it is written, kept, and read like any other text."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import family, llama, tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import DataConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data.open import training_rows
from wrinklefree.data.packing import encode
from wrinklefree.data.questions import read_questions
from wrinklefree.data.template import as_chat
from wrinklefree.engine.binding import Append
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.source import RoundedSource
from wrinklefree.generate.selftext import voices, write
from wrinklefree.generate.selftext.documents import Ask, Author, Written, document_start, repeats
from wrinklefree.generate.selftext.kept import DOCUMENTS, Documents, text_file
from wrinklefree.generate.selftext.write import Wish, kept_in, self_text
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_tokenizer

WISH = Wish(tokens=600, length=48, chat_share=0.5)


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerBase:
    return open_tokenizer(resolve_pretrained("builtin:tiny"))


@pytest.fixture(scope="module")
def chatty(chatml: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A random model that talks with this tokenizer, and often says a special token."""
    model = llama(vocab_size=len(chatml), tie_word_embeddings=False, max_position_embeddings=128)
    with torch.no_grad():
        model.lm_head.weight[2:4] = 0.3 * model.lm_head.weight[2:4].sign()
        model.lm_head.weight *= 8
    return model


def content(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def with_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_the_text_is_the_same_for_any_number_of_documents_at_a_time_and_threads(
    chatty: PreTrainedModel, chatml: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    texts = []
    for slots, threads in ((1, 1), (3, 2), (32, 1)):
        for _ in with_threads(threads):
            texts.append(content(self_text(chatty, chatml, tmp_path / f"{slots}", WISH, slots)))
    assert texts[0] == texts[1] == texts[2]
    assert len({json.dumps(row) for row in texts[0]}) == len(texts[0]) > 5
    assert content(self_text(chatty, chatml, tmp_path / "other", replace(WISH, seed=1))) != texts[0]


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the writing be interrupted after so many documents."""
    add, left = Documents.add, [after]

    def stopping(self: Documents, written: Written) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, written)

    monkeypatch.setattr(Documents, "add", stopping)


@pytest.mark.parametrize("native", [True, False])
def test_an_interrupted_writing_goes_on_to_the_same_text(
    native: bool,
    chatty: PreTrainedModel,
    chatml: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(voices, "GROUP", 4)
    if not native:
        monkeypatch.setattr(voices, "supports", lambda config: "asked for")
    whole = self_text(chatty, chatml, tmp_path / "whole", WISH)
    with monkeypatch.context() as patch:
        interrupted(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            self_text(chatty, chatml, tmp_path / "parts", WISH)
    file = tmp_path / "parts" / DOCUMENTS
    assert len(file.read_bytes().splitlines()) == 5
    with file.open("ab") as tail:
        tail.write(file.read_bytes().splitlines()[0][:20])
    parts = self_text(chatty, chatml, tmp_path / "parts", WISH)
    assert "its last 20 bytes are damaged" in caplog.text
    assert parts.read_bytes() == whole.read_bytes()


def test_kept_text_is_used_again_and_a_longer_one_begins_with_it(
    chatty: PreTrainedModel, chatml: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = self_text(chatty, chatml, tmp_path, WISH)
    longer = self_text(chatty, chatml, tmp_path, replace(WISH, tokens=900))
    assert content(longer)[: len(content(first))] == content(first)
    assert len(content(longer)) > len(content(first))
    monkeypatch.setattr(write, "find_voice", lambda *args: pytest.fail("it writes again"))
    assert self_text(chatty, chatml, tmp_path, WISH) == first
    shorter = self_text(chatty, chatml, tmp_path, replace(WISH, tokens=300))
    assert content(first)[: len(content(shorter))] == content(shorter)


def test_another_model_manner_or_tokenizer_has_another_folder(tmp_path: Path) -> None:
    model, words = llama(), tokenizer()
    mine = kept_in(tmp_path, "toy", model, words, WISH)
    assert kept_in(tmp_path, "toy", llama(), tokenizer(), replace(WISH, tokens=5, minutes=1)) == mine
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert kept_in(tmp_path, "toy", model, words, WISH) != mine
    words.chat_template = "{{ messages }}"
    assert kept_in(tmp_path, "toy", llama(), words, WISH) != mine
    for other in ({"length": 8}, {"chat_share": 0.1}, {"temperature": 0.5}, {"top_p": 0.5}, {"seed": 7}):
        assert kept_in(tmp_path, "toy", llama(), tokenizer(), replace(WISH, **other)) != mine


def author(words: PreTrainedTokenizerBase, **more: Any) -> Author:
    values: dict[str, Any] = {"length": 200, "chat_share": 1.0, "seed": 0} | more
    return Author(words, llama().generation_config, **values)


def told(author: Author, *turns: Sequence[int]) -> tuple[list[Ask], Written]:
    """What document 0 asks for if the model says these turns, and what comes of it."""
    writing = author.begin(0)
    asks = [next(writing)]
    try:
        for turn in turns:
            asks.append(writing.send(list(turn)))
    except StopIteration as done:
        return asks, done.value
    raise AssertionError("it goes on")


def test_a_conversation_is_what_the_template_writes(chatml: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    question, answer = (chatml("What is a tuple?")["input_ids"], chatml(" A sequence\nof values. ")["input_ids"])
    asks, written = told(author(chatml), [*question, end], [*answer, end])
    assert chatml.decode(asks[0].prompt) == "<|im_start|>user\n"
    assert chatml.decode(asks[1].prompt) == "<|im_start|>user\nWhat is a tuple?<|im_end|>\n<|im_start|>assistant\n"
    assert end in asks[0].ends
    assert end in asks[1].ends
    assert written.chat
    assert written.row is not None
    assert [turn["content"] for turn in written.row["messages"]] == ["What is a tuple?", " A sequence\nof values. "]
    seen = [*asks[1].prompt, *answer, end]
    (tmp_path / "own.jsonl").write_text(f"{json.dumps({'text': 'held out'})}\n{json.dumps(written.row)}\n")
    (document,) = training_rows(DataConfig(source="local", path=str(tmp_path / "own.jsonl")), chatml).documents(None)
    assert document == as_chat(chatml, written.row["messages"])
    assert encode(chatml, [document])[0][0].tolist()[: len(seen)] == seen


def test_a_conversation_that_the_template_would_change_stays_as_the_model_saw_it(
    chatml: PreTrainedTokenizerBase,
) -> None:
    end, words = chatml.convert_tokens_to_ids("<|im_end|>"), chatml("for x in y")["input_ids"]
    _, cut = told(author(chatml), [*words, end], words)  # its length is used up
    seen = "<|im_start|>user\nfor x in y<|im_end|>\n<|im_start|>assistant\nfor x in y"
    assert cut.row == {"text": seen}
    template = chatml.chat_template
    try:
        chatml.chat_template = template.replace("message['content']", "message['content'].strip()")
        _, stripped = told(author(chatml), [*chatml(" for x")["input_ids"], end], [*words, end])
    finally:
        chatml.chat_template = template
    assert stripped.row == {"text": "<|im_start|>user\n for x<|im_end|>\n<|im_start|>assistant\nfor x in y<|im_end|>"}


def test_what_is_no_document_is_dropped(chatml: PreTrainedTokenizerBase) -> None:
    end, words = chatml.convert_tokens_to_ids("<|im_end|>"), chatml("for x in y")["input_ids"]
    assert told(author(chatml), words)[1].dropped == "the question has no end"
    assert told(author(chatml), [*words, chatml.eos_token_id])[1].dropped == "the question has no end"
    assert told(author(chatml), [end], [*words, end])[1].dropped == "nothing was asked"
    assert told(author(chatml), [*words, end], [end])[1].dropped == "empty"
    assert told(author(chatml), [*words, end], words * 20)[1].dropped == "it repeats itself"
    assert told(author(chatml, chat_share=0.0), [chatml.eos_token_id])[1].dropped == "empty"
    assert told(author(chatml, chat_share=0.0), words)[1].row == {"text": "for x in y"}


def test_repetition() -> None:
    assert repeats([9, 9, *[1, 2, 3] * 30])
    assert repeats(list(range(32)) * 2)
    assert not repeats(list(range(33)) * 2)
    assert not repeats([1] * 63)


def test_documents_begin_as_in_pretraining(chatml: PreTrainedTokenizerBase) -> None:
    assert document_start(chatml) == chatml.convert_tokens_to_ids("<|endoftext|>")
    assert document_start(tokenizer()) == tokenizer().eos_token_id
    without = tokenizer()
    without.eos_token = None
    with pytest.raises(UserError, match="no token to begin a document with"):
        document_start(without)


def test_a_tokenizer_without_a_template_gets_texts_alone(tmp_path: Path) -> None:
    rows = content(self_text(llama(), tokenizer(), tmp_path, WISH))
    assert all(row.keys() == {"text"} for row in rows)


def test_minutes_end_it_and_what_there_is_is_used(
    chatty: PreTrainedModel, chatml: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def minutes(since: float) -> float:
        clock[0] += 0.01  # per step of the decoder
        return clock[0]

    whole = content(self_text(chatty, chatml, tmp_path / "whole", WISH))
    monkeypatch.setattr(write, "_minutes", minutes)
    short = replace(WISH, tokens=5000, minutes=1)
    early = self_text(chatty, chatml, tmp_path / "early", short, slots=3)
    assert early == text_file(tmp_path / "early", 5000, 1)
    assert whole[0] in content(early)
    assert not text_file(tmp_path / "early", 5000).exists()
    monkeypatch.setattr(write, "find_voice", lambda *args: pytest.fail("it writes again"))
    assert self_text(chatty, chatml, tmp_path / "early", short) == early
    monkeypatch.undo()
    more = self_text(chatty, chatml, tmp_path / "early", replace(short, tokens=600, minutes=None))
    assert content(more) == whole
    monkeypatch.setattr(write, "_minutes", lambda since: 9.0)
    with pytest.raises(UserError, match="wrote nothing to train on in 1 minutes"):
        self_text(chatty, chatml, tmp_path / "none", replace(WISH, minutes=1))


@pytest.mark.parametrize("name", ["gemma"])
def test_other_families_write_in_transformers(
    name: str,
    chatml: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(voices, "GROUP", 8)
    caplog.set_level(logging.INFO, logger="wrinklefree")
    model = family(name, vocab_size=len(chatml))
    state = torch.get_rng_state()
    rows = content(self_text(model, chatml, tmp_path / "a", WISH))
    assert "transformers (model_type" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    assert content(self_text(model, chatml, tmp_path / "b", WISH)) == rows
    assert len({json.dumps(row) for row in rows}) == len(rows)


@pytest.mark.parametrize("make", [llama, lambda: family("qwen3", tie_word_embeddings=False)])
def test_eight_bits_say_nearly_what_the_model_says(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    engine = Engine.from_source(RoundedSource(model), threads=1, slots=1)
    assert engine.weight_bytes() < 1.7 * model.num_parameters()  # int8 and scales, for such narrow layers
    prompt = list(range(3, 20))
    with torch.no_grad():
        wanted = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    found = np.zeros(len(wanted), np.float32)
    engine._decoder.step([Append(0, prompt, None, found)])
    got = torch.from_numpy(found).log_softmax(-1)
    assert (wanted.exp() * (wanted - got)).sum() < 1e-3


def test_without_an_end_of_sequence_it_says_so_before_it_writes(tmp_path: Path) -> None:
    words = tokenizer()
    words.eos_token = None
    with pytest.raises(UserError, match="no eos_token to end documents with"):
        self_text(llama(), words, tmp_path, WISH)


def test_questions_are_answered_in_their_order_and_again(
    chatty: PreTrainedModel, chatml: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    questions = ("What is a stack?", "And a queue?")
    written = Documents(self_text(chatty, chatml, tmp_path, replace(WISH, questions=questions)).parent).done
    assert len(written) > 4
    for number, document in written.items():
        row = document.row
        if row is not None:
            assert document.chat
            said = row["messages"][0]["content"] if "messages" in row else row["text"]
            assert questions[number % 2] in said
    assert kept_in(tmp_path, "m", chatty, chatml, WISH) != kept_in(
        tmp_path, "m", chatty, chatml, replace(WISH, questions=questions)
    )


def test_questions_need_a_chat_template(chatty: PreTrainedModel) -> None:
    plain = tokenizer()
    assert plain.chat_template is None
    with pytest.raises(UserError, match="no chat template"):
        Author(plain, chatty.generation_config, length=48, chat_share=0, seed=0, questions=["?"])


@pytest.mark.parametrize(
    ("rows", "said"),
    [([], "has no row"), ([{"answer": "1"}], "no text in a column question"), ([{"question": " "}], "no text")],
)
def test_a_file_without_questions_is_refused(rows: list[dict[str, str]], said: str, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=said):
        read_questions(file)
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "other.jsonl")


def test_questions_come_once_from_the_first_column_that_has_them(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    rows = [{"prompt": "b?"}, {"question": "a? ", "prompt": "x"}, {"instruction": "b?"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_questions(file) == ["b?", "a?"]
