"""Rows with columns instruction, context (may be empty or missing) and response."""

from wrinklefree.data.chat import Reading, conversation, optional, text, turns
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row as a conversation. Raises UserError, beginning with `where`, if the row has another format."""
    question = text(row, "instruction", where)
    answer = text(row, "response", where)
    return conversation(turns(question, optional(row, "context"), answer, "\n\nContext:\n"), reading, where)
