"""Columns instruction, input (may be empty or missing) and output."""

from wrinklefree.data.chat import Reading, conversation, optional, text, turns
from wrinklefree.data.sources import Document, Row

READS = ("enable_thinking", "mask_prompt")


def document(row: Row, reading: Reading, where: str) -> Document:
    """The row as text. Raises UserError naming `where` for a row of another format."""
    question = text(row, "instruction", where)
    answer = text(row, "output", where)
    return conversation(turns(question, optional(row, "input"), answer, "\n\n"), reading, where)
