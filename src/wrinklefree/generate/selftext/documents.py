"""What a model writes when nobody asks it: texts from their first token on, and conversations with itself.

A document is a coroutine. It yields an `Ask`, gets the tokens that the model continued with, and returns a `Written`.
So whoever runs the model may run many documents at once, in any order: document `number` is the same every time.

- A text begins with the token that documents begin with in pretraining, and ends with any special token.
- A conversation begins with the chat template, opened for a user. The model writes the question, the template opens the
  assistant's turn, and the model answers (the first turn as in Magpie, arXiv 2406.08464).
- If there are questions, every document is a conversation that answers one of them, in their order, again and again.
"""

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.core.text import without_surrogates
from wrinklefree.data.chat import PROBE
from wrinklefree.data.template import as_chat
from wrinklefree.generate.generate import turn_end

Row = dict[str, Any]  # of a .jsonl file: a text, or messages

# Tokens that documents begin with in pretraining, if the tokenizer puts none in front itself: an instruction-tuned
# model's own bos and eos may be the marks of turns.
STARTS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")

QUESTION_SHARE = 4  # a question may take a quarter of its conversation

TAIL = 64  # a document whose last tokens are one phrase of at most half as many, again and again, is dropped


@dataclass(frozen=True)
class Ask:
    """Tokens to continue."""

    prompt: list[int]
    seed: int
    ends: frozenset[int]  # a token of these is the last one
    most: int  # tokens, at least 1


@dataclass(frozen=True)
class Written:
    """A document that is done."""

    number: int
    tokens: int
    row: Row | None  # None if it was dropped
    dropped: str = ""  # the reason
    chat: bool = False  # whether it is a conversation


Writing = Generator[Ask, list[int], Written]


@dataclass(frozen=True)
class _Template:
    """The parts of a chat template around a user's words."""

    opening: list[int]  # before the user's words
    middle: list[int]  # after them, up to the assistant's words
    ends: frozenset[int]  # of an answer


class Author:
    """Begins the documents of one model, by their numbers."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        generation: GenerationConfig,
        *,
        length: int,
        chat_share: float,
        seed: int,
        questions: Sequence[str] = (),
    ) -> None:
        """Raises UserError if

        - the tokenizer has no token that a document could begin with,
        - there are questions, and no chat template to ask them in.
        """
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self.start = document_start(tokenizer)
        self.special = frozenset(_special(tokenizer))
        own = generation.eos_token_id
        stops = own if isinstance(own, list) else [own]
        self.stops = frozenset(i for i in (*stops, tokenizer.eos_token_id, self.start) if i is not None)
        asks = chat_share or questions
        self.template = _find_template(tokenizer, self.special, self.stops) if asks else None
        if questions and self.template is None:
            raise UserError("data.self_questions: the tokenizer has no chat template to ask them in")
        self.chat_share = chat_share if self.template else 0.0
        self.questions = questions

    def begin(self, number: int) -> Writing:
        """Document `number`, from its beginning."""
        template = self.template
        if template is not None and self.questions:
            return self._answer(number, template, self.questions[number % len(self.questions)])
        # Drawn, not every second one: every 20th document is held out.
        if template is not None and random.Random(self._seed(number, "kind")).random() < self.chat_share:
            return self._conversation(number, template)
        return self._text(number)

    def _seed(self, number: int, part: str) -> int:
        return int(fingerprint([self.seed, number, part]), 16)

    def _text(self, number: int) -> Writing:
        tokens = yield Ask([self.start], self._seed(number, "text"), self.special | self.stops, self.length - 1)
        text = self._decoded(_without_end(tokens, self.special | self.stops)).rstrip("\ufffd")  # a cut character
        return _judged(Written(number, 1 + len(tokens), {"text": text}), tokens, text)

    def _conversation(self, number: int, template: _Template) -> Writing:
        most = max(1, self.length // QUESTION_SHARE)
        asked = yield Ask(template.opening, self._seed(number, "question"), self.special | self.stops, most)
        question = self._decoded(asked[:-1])
        if asked[-1] != template.middle[0]:
            return Written(number, len(asked), None, "the question has no end")
        if not question.strip():
            return Written(number, len(asked), None, "nothing was asked")
        return (yield from self._answered(number, template, question, asked[:-1]))

    def _answer(self, number: int, template: _Template, question: str) -> Writing:
        asked = self.tokenizer(question, add_special_tokens=False)["input_ids"]
        return (yield from self._answered(number, template, question, asked))

    def _answered(self, number: int, template: _Template, question: str, asked: list[int]) -> Writing:
        prompt = [*template.opening, *asked, *template.middle]
        room = self.length - len(prompt)
        if room < 1:
            return Written(number, len(asked), None, "the question is too long")
        answered = yield Ask(prompt, self._seed(number, "answer"), template.ends, room)
        answer = self._decoded(_without_end(answered, template.ends))
        row = self._as_row(question, answer, [*prompt, *answered], answered[-1] in template.ends)
        return _judged(Written(number, len(prompt) + len(answered), row, chat=True), answered, answer)

    def _as_row(self, question: str, answer: str, tokens: list[int], ended: bool) -> Row:
        """The conversation as messages, if the chat template writes them as the model saw them, or else as a text."""
        seen = self._decoded(tokens)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if ended and as_chat(self.tokenizer, messages).startswith(seen):
            return {"messages": messages}
        return {"text": seen.rstrip("\ufffd")}

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        return without_surrogates(text)


def document_start(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that documents begin with in pretraining. Raises UserError if the tokenizer has none."""
    front = tokenizer("a")["input_ids"][:1]
    if tokenizer.bos_token_id is not None and front == [tokenizer.bos_token_id]:
        return int(tokenizer.bos_token_id)
    words = tokenizer.get_vocab()
    named = [words[name] for name in STARTS if name in words]
    found = [i for i in (*named, tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not found:
        raise UserError(f"tokenizer {tokenizer.name_or_path!r} has no token to begin a document with: set a bos_token")
    return int(found[0])


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}


def _find_template(
    tokenizer: PreTrainedTokenizerBase, special: frozenset[int], stops: frozenset[int]
) -> _Template | None:
    """The parts of the chat template. None if there is none, or if no special token ends a user's turn in it."""
    if not tokenizer.chat_template:
        return None
    text = as_chat(tokenizer, [{"role": "user", "content": PROBE}], add_generation_prompt=True)
    before, found, after = text.partition(PROBE)
    opening, middle = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    if not found or not opening or not middle or middle[0] not in special:
        return None
    # A new turn ends an answer too, if the model leaves out the mark of its end.
    turns = (turn_end(tokenizer), next((i for i in reversed(opening) if i in special), None))
    return _Template(opening, middle, stops | {i for i in turns if i is not None})


def _without_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return tokens[:-1] if tokens and tokens[-1] in ends else tokens


def _judged(written: Written, last: list[int], text: str) -> Written:
    """The document, or why it is dropped. `last` are the tokens that were written last, and `text` is what they say."""
    if not text.strip():
        return replace(written, row=None, dropped="empty")
    if repeats(last):
        return replace(written, row=None, dropped="it repeats itself")
    return written


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the last `TAIL` tokens are one phrase, said twice or more often."""
    tail = list(tokens[-TAIL:])
    return len(tail) == TAIL and any(tail[size:] == tail[:-size] for size in range(1, TAIL // 2 + 1))
