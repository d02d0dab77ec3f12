"""Rows with text in the column `data.text_column`, or else with `messages`, which the chat template writes."""

from wrinklefree.core.errors import UserError
from wrinklefree.data.chat import Reading, columns, listed, written
from wrinklefree.data.sources import Document, Row, fitting_format

READS = ("text_column",)


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row's text. Raises UserError, naming the row's columns, if there is none."""
    if reading.column in row:
        return _text(row[reading.column], reading.column, where)
    if "messages" not in row:
        raise UserError(f"{where}: no column {reading.column!r}; {_instead(row)}")
    if not isinstance(row["messages"], list | None):
        raise UserError(f"{where}: messages must be a list of {{role, content}}")
    messages = listed(row, ("messages",), where)
    return written(reading.tokenizer, messages, where) if messages else ""


def _text(value: object, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} holds {type(value).__name__}, not text: set data.text_column")
    return value


def _instead(row: Row) -> str:
    """Return what would read a row like this one."""
    format = fitting_format(row)
    other = f"{format}, or " if format else ""
    return f"{other}set data.text_column to one of: {columns(row)}"
