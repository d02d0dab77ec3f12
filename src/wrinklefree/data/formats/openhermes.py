"""Column conversations, a list of {from, value}."""

from wrinklefree.data.chat import Reading, conversation, listed
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """The row as text. Raises UserError naming `where` for a row of another format."""
    return conversation(listed(row, ("conversations",), where), reading, where)
