"""Generate text: one completion, or a conversation on the terminal.

A model is either a transformers model or the native `Engine`. Both take the same sampling settings. At temperature 0
they give the same text; above it they differ, because each draws its own random numbers.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import has_surrogates
from wrinklefree.data.template import as_chat
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.generate.text import TextStream

Message = dict[str, str]

TOP_K = 50  # the default of transformers, if neither the user nor the model's generation config sets one


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample. If `top_k` or `top_p` is None, the model's generation config decides."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()  # the text ends before the first of these


@dataclass(frozen=True)
class Said:
    """Text that a model said, how many tokens it read and generated, and why it ended."""

    text: str
    prompt_tokens: int
    tokens: int
    finish: Literal["stop", "length"]


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
    **more: Any,
) -> str:
    """Continue `prompt` and return the new text. Temperature 0 always takes the likeliest token and ignores the seed.

    `show` is called with each piece of text as it is generated. `more` are further fields of `SamplingOptions`.
    Raises UserError if the prompt is empty, or leaves no room in the model's context.
    """
    choice = SamplingOptions(max_new_tokens, temperature, seed, **more)
    return answer(model, tokenizer, prompt, choice, show or _hide).text


def answer(
    model: Any,
    tokenizer: Any,
    prompt: str,
    choice: SamplingOptions,
    show: Callable[[str], None] | None = None,
    begin: Callable[[], None] | None = None,
) -> Said:
    """Continue `prompt`, and return the new text with its counts.

    `begin` is called when the request has been checked and before the model runs, `show` with each piece of text.
    Raises UserError if a setting is out of range, or if the prompt is empty or leaves no room in the context.
    """
    ids = _encode(tokenizer, prompt)
    _room(model, ids.shape[1])
    _sampling(choice, _generation_of(model), ())
    if begin is not None:
        begin()
    return _say(model, tokenizer, ids, choice, show=show or _hide)


def reply(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    repetition_penalty: float = 1.0,
    thinking: bool | None = None,
) -> str:
    """Answer `prompt` in the model's chat template. Without a template, continue it as plain text.

    `thinking` is passed to the template as `enable_thinking`, unless it is None.
    Raises UserError if the prompt is empty, or leaves no room in the model's context.
    """
    chat = bool(tokenizer.chat_template)
    ids = _encode_chat(model, tokenizer, [_from_user(prompt)], thinking) if chat else _encode(tokenizer, prompt)
    stop = turn_end(tokenizer) if chat else None
    choice = SamplingOptions(max_new_tokens, temperature, seed, repetition_penalty)
    return _say(model, tokenizer, ids, choice, stop).text


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}


def stream(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, **more: Any) -> str:
    """Continue `prompt`, print prompt and text as they are generated, and return the new text.

    `more` are further fields of `SamplingOptions`. Nothing is printed before all of them have been checked.
    Raises UserError as `answer` does.
    """
    choice = SamplingOptions(max_new_tokens, **more)
    return answer(model, tokenizer, prompt, choice, _show, begin=lambda: _show(prompt)).text


def interactive(
    model: Any,
    tokenizer: Any,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    seed: int = 0,
    read: Callable[[str], str] = input,
    repetition_penalty: float = 1.0,
    thinking: bool | None = None,
    **more: Any,
) -> None:
    """Read lines and answer each, until `/exit` or Ctrl-D.

    With `chat`, lines go through the tokenizer's chat template and the model sees the earlier turns. `read` returns the
    next line. `more` are further fields of `SamplingOptions`. Ctrl-C ends an answer, not the session, and a line that
    cannot be answered is an error of its own.
    Raises UserError if `chat` is set and the tokenizer has no template, or if a setting is out of range.
    """
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: this model's tokenizer has no chat template; leave --chat out to complete text")
    choice = SamplingOptions(max_new_tokens, temperature, seed, repetition_penalty, **more)
    _sampling(choice, _generation_of(model), ())
    print("/exit or Ctrl-D ends; Ctrl-C ends an answer" + ("; /new forgets the conversation" if chat else ""))
    history: list[Message] = []
    stop = turn_end(tokenizer) if chat else None
    while (line := _read_line(read)) is not None:
        if line == "/new":
            history.clear()
        if not line.strip() or line == "/new":
            continue
        history.append(_from_user(line))
        try:
            _check_text(line)
            ids = _encode_chat(model, tokenizer, history, thinking) if chat else _encode(tokenizer, line)
            text = _until_interrupted(model, tokenizer, ids, replace(choice, seed=seed + len(history)), stop)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            history.pop()
        else:
            history.append({"role": "assistant", "content": text})


def _check_text(line: str) -> None:
    """Raise UserError for a line with bytes that are no text in the terminal's encoding."""
    if has_surrogates(line):
        raise UserError("this line is not UTF-8 text")


def _until_interrupted(model: Any, tokenizer: Any, ids: Tensor, choice: SamplingOptions, end: int | None) -> str:
    """Show an answer and return it; Ctrl-C ends it early."""
    pieces: list[str] = []

    def show(piece: str) -> None:
        pieces.append(piece)
        _show(piece)

    try:
        return _say(model, tokenizer, ids, choice, end, show).text
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # another signal, such as SIGTERM: see cli.py
            raise
    print(flush=True)
    return "".join(pieces)


def _read_line(read: Callable[[str], str]) -> str | None:
    """The next line, or None at the end."""
    try:
        line = read("> ")
    except EOFError:
        print()
        return None
    return None if line.strip() == "/exit" else line


def _encode(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids [1, length] of a prompt. Raises UserError if there are none."""
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty: give some text to continue")
    return ids.long()


def _encode_chat(model: Any, tokenizer: Any, history: list[Message], thinking: bool | None = None) -> Tensor:
    """Token ids [1, length] of the conversation, up to the point at which the assistant answers.

    Once the conversation fills more than half of the model's context, the oldest turns are removed from `history`.
    """
    more = {} if thinking is None else {"enable_thinking": thinking}
    while True:
        text = as_chat(tokenizer, history, add_generation_prompt=True, **more)
        ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if len(history) == 1 or ids.shape[1] <= context_of(model) // 2:
            return ids
        del history[:2]


def turn_end(tokenizer: Any) -> int | None:
    """The special token that ends an assistant's turn in the chat template, or None if there is no such token."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(as_chat(tokenizer, turns), add_special_tokens=False).input_ids
    special = [i for i in ids if i in tokenizer.all_special_ids]
    return special[-1] if special else None


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _hide(piece: str) -> None:
    pass


def _say(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    choice: SamplingOptions,
    end: int | None = None,
    show: Callable[[str], None] = _hide,
) -> Said:
    """Generate the text after `ids` [1, length], and show it piece by piece.

    Generation ends at the tokenizer's end-of-sequence token, and at the token `end` if one is given.
    """
    room = _room(model, ids.shape[1])
    choice = replace(choice, max_new_tokens=min(choice.max_new_tokens, room))
    ends = [i for i in (tokenizer.eos_token_id, end) if i is not None]
    text = TextStream(tokenizer, choice.stop)
    tell = _Teller(text, show)
    if isinstance(model, Engine):
        _run_native(model, ids, choice, ends, tell)
    else:
        _run_transformers(model, tokenizer, ids, choice, ends, tell)
    tell.end()
    finish: Literal["stop", "length"] = "stop" if text.stopped or tell.last in ends else "length"
    return Said(text.text, ids.shape[1], tell.tokens, finish)


class _Teller(BaseStreamer):  # type: ignore[misc]  # transformers is untyped here
    """Turns generated tokens into text and shows it, then ends the line. The prompt is not shown."""

    def __init__(self, text: TextStream, show: Callable[[str], None]) -> None:
        self.text, self.show = text, show
        self.prompt_is_next, self.ended = True, False
        self.tokens, self.last = 0, -1  # how many came, and the last of them

    def put(self, value: Tensor) -> None:
        """Called by transformers: first with the whole prompt, then with each new token."""
        if not self.prompt_is_next:
            self.add(int(value))
        self.prompt_is_next = False

    def add(self, token: int) -> None:
        """Take one more token."""
        self.tokens, self.last = self.tokens + 1, token
        self.show(self.text.add(token))

    def end(self) -> None:
        if not self.ended:
            self.show(self.text.end() + "\n")
        self.ended = True


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Tells transformers to stop once the text contains a stop string."""

    def __init__(self, text: TextStream) -> None:
        self.text = text

    def __call__(self, input_ids: Tensor, scores: Tensor, **more: Any) -> Tensor:
        return torch.full((len(input_ids),), self.text.stopped, device=input_ids.device)


def _run_native(engine: Engine, ids: Tensor, choice: SamplingOptions, ends: Sequence[int], tell: _Teller) -> None:
    # Closed at once also if Ctrl-C comes: else its slot would stay taken.
    with closing(engine.generate(ids[0].tolist(), _sampling(choice, engine.generation, ends))) as tokens:
        for token in tokens:
            tell.add(token)
            if tell.text.stopped:
                return


def _sampling(choice: SamplingOptions, generation: GenerationConfig, ends: Sequence[int]) -> Sampling:
    """The settings for an engine. Raises UserError if one is out of range."""
    return Sampling(
        max_new_tokens=choice.max_new_tokens,
        temperature=choice.temperature,
        top_k=_first(choice.top_k, generation.top_k, TOP_K),
        top_p=_first(choice.top_p, generation.top_p, 1.0),
        repetition_penalty=choice.repetition_penalty,
        seed=choice.seed,
        stop_tokens=frozenset(ends),
    )


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(value for value in values if value is not None)


@torch.no_grad()  # not inference mode: in that mode packed layers cannot share work
def _run_transformers(
    model: Any, tokenizer: Any, ids: Tensor, choice: SamplingOptions, ends: Sequence[int], tell: _Teller
) -> None:
    """Generate with transformers. The caller's random state does not change."""
    sampling = _sampling(choice, model.generation_config, ends)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    ids = ids.to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(choice.seed)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=list(ends) or None,
            streamer=tell,
            stopping_criteria=[_Stop(tell.text)],
            repetition_penalty=sampling.repetition_penalty,
            **options,
        )


def _generation_of(model: Any) -> GenerationConfig:
    return model.generation if isinstance(model, Engine) else model.generation_config


def context_of(model: Any) -> int:
    """The number of tokens in the model's context; 2^31, so no limit, if the model states none."""
    if isinstance(model, Engine):
        return model.context
    return int(model.config.to_dict().get("max_position_embeddings") or 2**31)


def _room(model: Any, used: int) -> int:
    """How many tokens fit into the context after `used` of them. Raises UserError if none does."""
    room = context_of(model) - used
    if room < 1:
        raise UserError(
            f"the prompt has {used} tokens, but the model's context is {context_of(model)}: shorten the prompt"
        )
    return room
