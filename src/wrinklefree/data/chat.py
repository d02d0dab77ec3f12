"""Turns the messages of a conversation into text, for the data formats that hold conversations."""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.sources import Document, Example, Row, fitting_format
from wrinklefree.data.template import as_chat

Message = dict[str, str]
# For models that write a thought before they answer (Qwen3). True: as the chat template writes it. False: without
# <think>...</think>. None: the bare contents, without a template.
Thinking = bool | None

# The documents that each value of `data.enable_thinking` makes from one conversation.
VARIANTS: dict[bool | str, tuple[Thinking, ...]] = {
    False: (False,),
    True: (True,),
    "none": (None,),
    "both": (False, True),
    "all": (False, True, None),
}

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


class Reading(NamedTuple):
    """How the rows of a dataset become documents."""

    tokenizer: PreTrainedTokenizerBase
    column: str = "text"  # with the text, for rows that are not conversations
    thinking: Thinking = False
    mask_prompt: bool = False  # learn only the last answer


def conversation(messages: list[Message], reading: Reading, where: str) -> Document:
    """Return a conversation as a document, which is empty if the last message is no answer.

    With `mask_prompt` it is an `Example`, of which only the last answer is learned. `where` is for error messages.
    """
    tokenizer, _, thinking, mask_prompt = reading
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        return ""
    text = as_text(tokenizer, messages, thinking, where)
    if not mask_prompt:
        return text
    before = messages[:-1]
    prompt = ""
    if before:  # templates refuse an empty conversation
        prompt = as_text(tokenizer, before, thinking, where, add_generation_prompt=True)
    # A template may end a prompt differently when no answer follows: take the part that both texts begin with.
    shared = next((i for i, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), len(prompt))
    return Example(text[:shared], text[shared:])


def as_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    thinking: Thinking,
    where: str,
    add_generation_prompt: bool = False,
) -> str:
    """Return messages as text, written by the chat template. Raises UserError if there is none, or if it refuses."""
    if thinking is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n" * add_generation_prompt
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: tokenizer {tokenizer.name_or_path!r} has no chat template to write it with")
    try:
        text = as_chat(tokenizer, messages, add_generation_prompt=add_generation_prompt, enable_thinking=thinking)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return text if thinking else THOUGHT.sub("", text)


def turns(instruction: str, more: str, answer: str, between: str) -> list[Message]:
    """Return a question and its answer as messages. `more`, if not blank, is added to the question after `between`."""
    question = instruction + between + more if more.strip() else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def listed(row: Row, columns: tuple[str, ...], where: str) -> list[Message]:
    """Return the messages in the first of `columns` that is not empty. Raises UserError if they are no messages."""
    value = next((row[column] for column in columns if row.get(column)), None)
    if not isinstance(value, list):
        raise UserError(f"{where}: no list in {' or '.join(columns)}; there are {', '.join(map(str, row))}")
    return [_message(turn, where) for turn in value]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a turn is {type(turn).__name__}, not {{role, content}} or {{from, value}}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise UserError(f"{where}: a turn of role {role!r} with {type(content).__name__}; roles: {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": content}


def text(row: Row, column: str, where: str) -> str:
    """Return the text in a column. Raises UserError if the column is missing or holds something else."""
    if not isinstance(row.get(column), str):
        advice = fitting_format(row) or "another data.format?"
        raise UserError(f"{where}: no text in {column!r}; there are {', '.join(map(str, row))}: {advice}")
    return str(row[column])


def optional(row: Row, column: str) -> str:
    """Return the text in a column, or "" if there is none."""
    value = row.get(column)
    return value if isinstance(value, str) else ""
