"""Turns the messages of a conversation into text, for the data formats that hold conversations."""

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.rows import EveryRowError
from wrinklefree.data.sources import Document, Example, Row, fitting_format
from wrinklefree.data.template import as_chat

Message = dict[str, Any]  # role and content, which are text, and what else a template may read, such as tool_calls
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

# The roles that datasets write, in small letters, with those that chat templates know.
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model", "chatgpt", "function_call"), "assistant"),
    **{"system": "system", "developer": "developer"},
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
}
# Other names of a role, of which the first one counts that the chat template has.
OTHERS = {"developer": ("developer", "system"), "tool": ("tool", "observation", "ipython", "function")}
PROBE = "wrinkle7"  # a content that no template changes
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
    if not messages or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
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
    """Return messages as text, written by the chat template. Raises UserError if it cannot write them."""
    if thinking is None:
        return "\n\n".join(message["content"] for message in messages) + "\n\n" * add_generation_prompt
    text = written(tokenizer, messages, where, add_generation_prompt=add_generation_prompt, enable_thinking=thinking)
    return text if thinking else THOUGHT.sub("", text)


def written(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, **values: bool) -> str:
    """Return messages as the chat template writes them, with `values` for it.

    Raises UserError if there is no template, if it refuses, or if it leaves out what a tool said.
    """
    text = _apply(tokenizer, messages, where, values)
    if any(message["role"] == "tool" for message in messages):
        probes = [message | {"content": PROBE} if message["role"] == "tool" else message for message in messages]
        if PROBE not in _apply(tokenizer, probes, where, values):
            raise UserError(f"{where}: a turn of role 'tool', which the chat template leaves out")
    return text


def _spoken(role: str, template: str) -> str:
    """Return the name that a chat template has for a role."""
    names = OTHERS.get(role, (role,))
    known = (name for name in names if f"'{name}'" in template or f'"{name}"' in template)
    return next(known, "system" if role == "developer" else role)


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], where: str, values: dict[str, bool]) -> str:
    if tokenizer.chat_template is None:
        raise EveryRowError(
            f"{where}: tokenizer {tokenizer.name_or_path!r} has no chat template to write messages with"
        )
    template = str(tokenizer.chat_template)
    spoken = [message | {"role": _spoken(message["role"], template)} for message in messages]
    try:
        return as_chat(tokenizer, spoken, **values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def turns(instruction: str, more: str, answer: str, between: str) -> list[Message]:
    """Return a question and its answer as messages. `more`, if not blank, is added to the question after `between`."""
    question = instruction + between + more if more.strip() else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def listed(row: Row, names: tuple[str, ...], where: str) -> list[Message]:
    """Return the messages in the first column of `names` that is not empty; an empty list if all are empty.

    Raises UserError if there is no such column, or if it holds no messages.
    """
    if not row.keys() & set(names):
        raise UserError(f"{where}: no column {' or '.join(names)}; there are {columns(row)}")
    name = next((name for name in names if row.get(name)), names[0])
    value = row.get(name) or []
    if not isinstance(value, list):
        raise UserError(f"{where}: no list in {name}, but {type(value).__name__}")
    return [_message(turn, where) for turn in value]


def _message(turn: Any, where: str) -> Message:
    """Return a turn with a role that templates know, and with text as its content."""
    if not isinstance(turn, dict):
        raise UserError(f"{where}: a turn is {type(turn).__name__}, not {{role, content}} or {{from, value}}")
    said: Any = turn.get("role", turn.get("from"))
    role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
    if role is None:
        raise UserError(f"{where}: a turn of role {short(said)}; roles: {', '.join(ROLES)}")
    content = _content(turn.get("content", turn.get("value")), said, where)
    more = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return {**more, "role": role, "content": content}


def _content(content: Any, role: str, where: str) -> str:
    """Return a turn's content as text. Null, as beside a call of a tool, is an empty text; parts are joined."""
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, role, where) for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of role {role!r} is {type(content).__name__}, not text")
    return content


def _part(part: Any, role: str, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise UserError(f"{where}: the content of role {role!r} has a part that is no text but {short(kind)}")
    return text


def short(value: Any) -> str:
    """Return a value for a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def columns(row: Row) -> str:
    """Return the names of a row's columns, for a message of one line."""
    names = [name if name.isprintable() else repr(name) for name in map(str, row)]
    shown = ", ".join(name[:40] for name in names[:12]) or "none"
    return f"{shown} and {len(names) - 12} more" if len(names) > 12 else shown


def text(row: Row, column: str, where: str) -> str:
    """Return the text in a column. Raises UserError if the column is missing or holds something else."""
    if not isinstance(row.get(column), str):
        advice = fitting_format(row) or "another data.format?"
        raise UserError(f"{where}: no text in {column!r}; there are {columns(row)}: {advice}")
    return str(row[column])


def optional(row: Row, column: str) -> str:
    """Return the text in a column, or "" if there is none."""
    value = row.get(column)
    return value if isinstance(value, str) else ""
