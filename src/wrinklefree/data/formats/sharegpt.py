"""Rows with a column conversations, messages or dialog, a list of {from | role, value | content}."""

from wrinklefree.data.chat import Reading, conversation, listed
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row as a conversation. Raises UserError, beginning with `where`, if the row has another format."""
    return conversation(listed(row, ("conversations", "messages", "dialog"), where), reading, where)
