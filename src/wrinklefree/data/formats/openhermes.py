"""Rows with a column conversations, a list of {from, value}."""

from wrinklefree.data.chat import Reading, conversation, listed
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row as a conversation. Raises UserError, beginning with `where`, if the row has another format."""
    return conversation(listed(row, ("conversations",), where), reading, where)
