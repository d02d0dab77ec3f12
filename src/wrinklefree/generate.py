"""Text from a model: one completion, or a conversation on the terminal."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from wrinklefree.core.errors import UserError

Message = dict[str, str]


def complete(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> str:
    """The text that follows `prompt`, without it; temperature 0 is greedy and ignores the seed.

    Raises UserError where the prompt is empty, or leaves no room in the model's context.
    """
    ids = _encode(tokenizer, prompt)
    return _decode(tokenizer, _generate(model, tokenizer, ids, max_new_tokens, temperature, seed))


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
    """What the model answers in its chat template, or `complete` where it has none.

    `thinking` is handed to templates that know it. Raises UserError like `complete`.
    """
    chat = bool(tokenizer.chat_template)
    ids = _encode_chat(model, tokenizer, [_from_user(prompt)], thinking) if chat else _encode(tokenizer, prompt)
    stop = _turn_end(tokenizer) if chat else None
    answer = _generate(model, tokenizer, ids, max_new_tokens, temperature, seed, None, stop, repetition_penalty)
    return _decode(tokenizer, answer)


def _from_user(text: str) -> Message:
    return {"role": "user", "content": text}


def stream(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0
) -> str:
    """`complete`, printing prompt and text word by word as they come."""
    ids = _encode(tokenizer, prompt)
    print(prompt, end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return _decode(tokenizer, _generate(model, tokenizer, ids, max_new_tokens, temperature, seed, streamer))


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
) -> None:
    """Answer line after line until `/exit` or Ctrl-D; with `chat`, in the tokenizer's template and with memory.

    Raises UserError where `chat` is asked of a tokenizer without a template.
    """
    if chat and not tokenizer.chat_template:
        raise UserError("--chat: this model's tokenizer has no chat template; leave --chat out to complete text")
    print("/exit or Ctrl-D ends" + ("; /new forgets the conversation" if chat else ""))
    history: list[Message] = []
    stop = _turn_end(tokenizer) if chat else None
    while (line := _read_line(read)) is not None:
        if line == "/new":
            history.clear()
        if not line.strip() or line == "/new":
            continue
        history.append(_from_user(line))
        ids = _encode_chat(model, tokenizer, history, thinking) if chat else _encode(tokenizer, line)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        sampling = (max_new_tokens, temperature, seed + len(history), streamer, stop, repetition_penalty)
        answer = _generate(model, tokenizer, ids, *sampling)
        history.append({"role": "assistant", "content": _decode(tokenizer, answer)})


def _read_line(read: Callable[[str], str]) -> str | None:
    """The next line, or None at the end."""
    try:
        line = read("> ")
    except EOFError:
        print()
        return None
    return None if line.strip() == "/exit" else line


def _encode(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids [1, length]."""
    ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise UserError("the prompt is empty: give some text to continue")
    return ids.long()


def _encode_chat(model: Any, tokenizer: Any, history: list[Message], thinking: bool | None = None) -> Tensor:
    """Token ids [1, length] of the conversation, up to where the assistant speaks.

    The oldest turns are removed from `history` once they fill more than half of the model's context.
    """
    known = {} if thinking is None else {"enable_thinking": thinking}
    while True:
        text = tokenizer.apply_chat_template(history, tokenize=False, add_generation_prompt=True, **known)
        ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if len(history) == 1 or ids.shape[1] <= _context(model) // 2:
            return ids
        del history[:2]


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that closes an assistant's turn in the template, where it has one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False).input_ids
    special = [i for i in ids if i in tokenizer.all_special_ids]
    return special[-1] if special else None


@torch.inference_mode()
def _generate(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    streamer: TextStreamer | None = None,
    stop: int | None = None,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """New token ids [length]; the caller's random state is left as it was."""
    room = _room(model, ids.shape[1])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ends = [i for i in (tokenizer.eos_token_id, stop) if i is not None]
    ids = ids.to(model.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=ends or None,
            streamer=streamer,
            repetition_penalty=repetition_penalty,
            **sampling,
        )
    return out[0, ids.shape[1] :]


def _context(model: Any) -> int:
    """The model's context in tokens; of a model that states none, as good as unlimited."""
    return int(model.config.to_dict().get("max_position_embeddings") or 2**31)


def _room(model: Any, used: int) -> int:
    """Tokens that fit after `used` ones. Raises UserError where none does."""
    room = _context(model) - used
    if room < 1:
        raise UserError(
            f"the prompt has {used} tokens, and the model's context is {_context(model)}: shorten the prompt"
        )
    return room


def _decode(tokenizer: Any, ids: Tensor) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text
