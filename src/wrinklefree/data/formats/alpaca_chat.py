"""Rows with columns instruction, input (may be empty or missing) and output."""

from wrinklefree.data.chat import Reading, conversation, optional, text, turns
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """Return the row as a conversation. Raises UserError, beginning with `where`, if the row has another format."""
    question = text(row, "instruction", where)
    answer = text(row, "output", where)
    return conversation(turns(question, optional(row, "input"), answer, "\n\n"), reading, where)
