"""Turn the prompt of a request into token ids. It is a text, token ids, or a conversation for the chat template."""

from typing import Any

from wrinklefree.core.errors import UserError
from wrinklefree.data.template import as_chat
from wrinklefree.serve.errors import ApiError
from wrinklefree.serve.schema import Chat, Completion


def encode(tokenizer: Any, request: Completion | Chat) -> list[int]:
    """Token ids of the request's prompt.

    Raises ApiError 400 for a conversation if the tokenizer has no chat template, or the template refuses it.
    """
    return _chat(tokenizer, request) if isinstance(request, Chat) else _completion(tokenizer, request)


def _completion(tokenizer: Any, request: Completion) -> list[int]:
    prompt = request.prompt
    if not isinstance(prompt, str):
        if not isinstance(prompt[0], str):
            return [int(token) for token in prompt]
        prompt = prompt[0]
    return list(tokenizer(prompt).input_ids)


def _chat(tokenizer: Any, request: Chat) -> list[int]:
    if not tokenizer.chat_template:
        raise ApiError(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
    messages = [message.plain() for message in request.messages]
    try:
        text = as_chat(tokenizer, messages, add_generation_prompt=True)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", "messages") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)
