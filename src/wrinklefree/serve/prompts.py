"""Turn the prompt of a request into token ids. It is a text, token ids, or a conversation for the chat template.

Special tokens in a sender's text stay text: `<|im_end|>` in a message does not end it. Where the server allows special
tokens, they are read as such.
"""

import inspect
import re
import secrets
from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.data.template import as_chat
from wrinklefree.serve.errors import ApiError
from wrinklefree.serve.schema import Chat, Completion
from wrinklefree.serve.tools import conversation, tools_of


def encode(tokenizer: Any, request: Completion | Chat, allow_special: bool = False) -> list[list[int]]:
    """Token ids of each of the request's prompts; a conversation is one.

    Raises ApiError 400 for a conversation if the tokenizer has no chat template, or the template refuses it.
    """
    if isinstance(request, Completion):
        return [_completion(tokenizer, prompt, allow_special) for prompt in request.prompts()]
    return [_chat(tokenizer, request, allow_special)]


def _completion(tokenizer: Any, prompt: str | list[int], allow_special: bool) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    return list(tokenizer(prompt, split_special_tokens=not allow_special).input_ids)


def texts(tokenizer: Any, request: Completion | Chat, ids: list[list[int]]) -> list[str]:
    """The texts that an answer begins with if the prompt is to be echoed."""
    if not isinstance(request, Completion) or not request.echo:
        return [""] * len(ids)
    pairs = zip(request.prompts(), ids, strict=True)
    return [prompt if isinstance(prompt, str) else tokenizer.decode(tokens) for prompt, tokens in pairs]


def _chat(tokenizer: Any, request: Chat, allow_special: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise ApiError(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
    _check_options(tokenizer, request.chat_template_kwargs)
    covers = _Covers([] if allow_special else _special_tokens(tokenizer))
    messages, more = conversation(str(tokenizer.chat_template), request, tools_of(request))
    more |= request.chat_template_kwargs
    try:
        text = as_chat(tokenizer, covers.cover_all(messages), add_generation_prompt=True, **covers.cover_all(more))
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    return covers.ids(tokenizer, text)


def _check_options(tokenizer: Any, options: dict[str, Any]) -> None:
    """Raise ApiError 400 if an option would be an argument of transformers, such as another template."""
    taken = {
        "self",
        "tokenizer",
        "messages",
        "conversations",
        *inspect.signature(tokenizer.apply_chat_template).parameters,
    }
    for name in taken & options.keys():
        where = f"chat_template_kwargs.{name}"
        raise ApiError(400, f"{where}: not a variable of a chat template", where, "unsupported_parameter")


def _special_tokens(tokenizer: Any) -> list[str]:
    """The texts of all special tokens, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


class _Covers:
    """Hides special tokens from the chat template and the tokenizer, behind words that nobody can guess."""

    def __init__(self, special: list[str]) -> None:
        self._key = f"x{secrets.token_hex(12)}x"
        self._special = re.compile("|".join(map(re.escape, special)) or r"(?!)")  # (?!) finds nothing
        self._hidden: list[str] = []

    def cover_all(self, value: Any) -> Any:
        """A JSON value with a word for each special token in its texts."""
        if isinstance(value, str):
            return self._special.sub(self._word, value)
        if isinstance(value, list):
            return [self.cover_all(each) for each in value]
        return {name: self.cover_all(each) for name, each in value.items()} if isinstance(value, dict) else value

    def _word(self, found: re.Match[str]) -> str:
        self._hidden.append(found[0])
        return f"{self._key}{len(self._hidden) - 1}x"

    def ids(self, tokenizer: Any, text: str) -> list[int]:
        """Token ids of a text with such words, each of which stands for the text of a special token."""
        pieces = re.split(rf"{self._key}(\d+)x", text)  # text, number, text, number, ..., text
        ids = list(tokenizer(pieces[0], add_special_tokens=False).input_ids)
        for number, after in zip(pieces[1::2], pieces[2::2], strict=True):
            hidden = self._hidden[int(number)]
            ids += tokenizer(hidden, add_special_tokens=False, split_special_tokens=True).input_ids
            ids += tokenizer(after, add_special_tokens=False).input_ids
        return ids
