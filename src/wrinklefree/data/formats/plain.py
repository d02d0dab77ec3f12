"""Rows with text in the column `data.text_column`, or else with `messages`, which the chat template writes."""

from functools import partial

from transformers import PreTrainedTokenizerBase

from wrinklefree.core.errors import UserError
from wrinklefree.data.chat import Reading
from wrinklefree.data.sources import Document, Row, row_text
from wrinklefree.data.template import as_chat

READS = ("text_column",)


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row's text. Raises UserError, naming the row's columns, if there is none."""
    return row_text(row, where, column=reading.column, chat=partial(_chat, reading.tokenizer))


def _chat(tokenizer: PreTrainedTokenizerBase, row: Row, where: str) -> str:
    """Return a row's `messages`, a list of {role, content}, as the tokenizer's chat template writes them."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: messages, but tokenizer {tokenizer.name_or_path!r} has no chat template to write them"
        )
    try:
        return as_chat(tokenizer, row["messages"])
    except UserError as error:
        raise UserError(f"{where}: messages must be a list of {{role, content}}; {error}") from error
