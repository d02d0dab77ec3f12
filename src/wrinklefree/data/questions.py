"""Questions for a model to answer, from a file (`data.self_questions`)."""

from pathlib import Path

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import without_surrogates
from wrinklefree.data import sources
from wrinklefree.data.chat import columns

COLUMNS = ("question", "prompt", "instruction")


def read_questions(path: Path) -> list[str]:
    """The texts in the first of `COLUMNS` that a row has, without repetitions, in the file's order.

    Raises UserError if there is no such file, no question in it, or a row without one.
    """
    if not path.is_file():
        raise UserError(f"data.self_questions={path}: no such file; give rows with a column {' or '.join(COLUMNS)}")
    found: dict[str, None] = {}

    def keep(row: sources.Row, where: str) -> str:
        found[_question(row, where)] = None
        return ""

    for _ in sources.read_documents(path, keep, piece=-1):
        pass
    if not found:
        raise UserError(f"data.self_questions={path}: has no row")
    return list(found)


def _question(row: sources.Row, where: str) -> str:
    texts = [row[name] for name in COLUMNS if isinstance(row.get(name), str)]
    if not texts or not texts[0].strip():
        raise UserError(f"{where}: no text in a column {' or '.join(COLUMNS)}; there are {columns(row)}")
    return without_surrogates(texts[0]).strip()
