"""Writes conversations by a tokenizer's chat template, a program that came with the model, in bounded time and memory.

Jinja's sandbox keeps it from files and from Python's insides, but not from looping or growing for ever.
"""

import resource
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import without_surrogates
from wrinklefree.families.foreign import REFUSALS

SECONDS = 10.0  # for one conversation; a long one takes milliseconds

MEMORY = 1 << 30  # bytes that one conversation may take while it is written

DEEPEST = 50  # macros inside one another

LONGEST = 1 << 26  # characters of the result

COMPILED = "<template>"  # the file name that Jinja gives to compiled templates

_LOCK = threading.Lock()  # the limit on memory is the process's


def as_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the messages as the text that the tokenizer's chat template makes of them.

    `options` are passed on to the template, such as `add_generation_prompt`.
    Raises UserError if the template refuses them, or takes too much time or memory.
    """
    try:
        _refuse_powers(tokenizer.chat_template)
        with _LOCK, _limited_memory(), _limited_time(SECONDS):
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        if not isinstance(text, str) or len(text) > LONGEST:
            raise TemplateError(f"its result is no text of at most {LONGEST:,} characters")
    except MemoryError as error:
        raise UserError(_said(tokenizer, f"needs more than {MEMORY >> 20} MiB of memory")) from error
    except REFUSALS as error:
        raise UserError(
            _said(tokenizer, f"says: {' '.join(str(error).split())[:300] or type(error).__name__}")
        ) from error
    return without_surrogates(text)


def _said(tokenizer: PreTrainedTokenizerBase, what: str) -> str:
    return f"{tokenizer.name_or_path or 'tokenizer'}: the chat template {what}"


def _refuse_powers(template: Any) -> None:
    """Raises TemplateError for the operator `**`: 9 ** 9 ** 9 is one step, which no limit on time can interrupt."""
    if any(map(_has_powers, template.values() if isinstance(template, dict) else [template])):
        raise TemplateError("powers (**) are not allowed in a template")


@lru_cache
def _has_powers(source: str) -> bool:
    words = [text for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    # After a bracket or a comma it hands on arguments by name.
    return any(word == "**" and before not in ("(", ",") for before, word in pairwise(words))


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Raise TemplateError in the block after `seconds`, at the next line of the template or the next call.

    Raise it too if macros call one another more than DEEPEST deep.
    """
    end, before, depth = time.monotonic() + seconds, sys.gettrace(), 0

    def trace(frame: FrameType, event: str, value: Any) -> Any:
        nonlocal depth
        if frame.f_code.co_filename == COMPILED:
            depth += (event == "call") - (event == "return")
        if time.monotonic() > end or depth > DEEPEST:
            sys.settrace(None)  # once is enough: Jinja runs code of its own while it passes the error on
            raise TemplateError(f"nested {depth} deep" if depth > DEEPEST else f"not done after {seconds:g} s")
        return trace if frame.f_code.co_filename == COMPILED else None

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process grow by at most MEMORY in the block; beyond, Python raises MemoryError. Linux only."""
    if not sys.platform.startswith("linux"):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    most = now + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
