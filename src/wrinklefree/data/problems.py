"""Problems that have one right answer, and the test whether a text gives it.

mod7_chains      made by data/chains.py
gsm8k            openai/gsm8k from the hub; the answer follows ####
FILE.jsonl       a `question` and an `answer` per line; the answer is bare, or follows #### as in GSM8K
"""

import hashlib
import re
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import without_surrogates
from wrinklefree.data import chains, sources
from wrinklefree.data.chat import columns
from wrinklefree.data.hub import hub_rows, load_hub
from wrinklefree.data.sources import Split

GSM8K = "openai/gsm8k"
MARK = "####"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


class Problem(NamedTuple):
    """A question and its right answer. Problems with equal questions have equal ids."""

    question: str
    gold: str

    @property
    def id(self) -> str:
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


def load_problems(source: str, split: Split, count: int, num_heldout: int) -> list[Problem]:
    """Return at most `count` problems from one split.

    | source | held out |
    |---|---|
    | a file | `num_heldout` problems, chosen by a hash |
    | gsm8k | the test split on the hub |
    | mod7_chains | by a hash, see data/chains.py |

    No problem is in both splits, except chains with one operation. Raises UserError if there is no such source, or no
    problem in it.
    """
    if source == chains.NAME:
        return [Problem(chain.question, chain.answer) for chain in chains.chains(split, count, seed=1)]
    if source == "gsm8k":
        stream = load_hub("gsm8k", GSM8K, "main", "train" if split == "train" else "test", "a JSONL file")
        rows = islice(hub_rows("gsm8k", stream), count)
        problems = [_problem(row, f"gsm8k row {n}") for n, row in enumerate(rows)]
    else:
        problems = _deal(list(_read(Path(source))), split, num_heldout)
    if not problems:
        raise UserError(f"thinking.pairs.problems={source}: no problem for the {split} split")
    return list(dict.fromkeys(problems))[:count]


def _read(path: Path) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"thinking.pairs.problems={path}: no such file; give {chains.NAME}, gsm8k or a JSONL file")
    problems: list[Problem] = []

    def keep(row: sources.Row, where: str) -> str:
        problems.append(_problem(row, where))
        return ""

    for _ in sources.read_documents(path, keep, piece=-1):
        pass
    return problems


def _problem(row: sources.Row, where: str) -> Problem:
    for column in ("question", "answer"):
        if not isinstance(row.get(column), (str, int, float)):
            raise UserError(f"{where}: a problem needs a {column!r}; there are {columns(row)}")
    question, answer = (without_surrogates(str(row[column])).strip() for column in ("question", "answer"))
    return Problem(question, answer.rpartition(MARK)[2].strip())


def _deal(problems: list[Problem], split: Split, num_heldout: int) -> list[Problem]:
    """Return one split, in the file's order. The problems with the lowest hashes are held out, at most half of all."""
    ids = sorted({problem.id for problem in problems})
    heldout = set(ids[: min(num_heldout, len(ids) // 2)])
    return [problem for problem in problems if (problem.id in heldout) == (split == "heldout")]


def same_answer(said: str, gold: str) -> bool:
    """Whether the text `said` gives the right answer `gold`.

    If `gold` is a number, the last number in the text has to equal it, however it is written: $1,200.0 is 1200, and 1/2
    is 0.5. Otherwise the words have to be the same, without regard to case and a final dot. If the text has a ####,
    only what follows it counts.
    """
    right = number(gold)
    text = said.rpartition(MARK)[2]
    if right is None:
        return text.strip().rstrip(".").casefold() == gold.strip().rstrip(".").casefold()
    numbers = _NUMBER.findall(text)
    return bool(numbers) and number(numbers[-1]) == right


def number(text: str) -> Fraction | None:
    """Return a text's value if it is a number and nothing else, or None."""
    plain = text.strip().removesuffix(".")
    if not _NUMBER.fullmatch(plain):
        return None
    try:
        return Fraction(plain.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):  # a denominator of 0, 1.5/2, thousands of digits
        return None
