"""Problems with a right answer, and when an answer is right.

mod7_chains      data/chains.py
gsm8k            openai/gsm8k from the hub; the answer stands after ####
FILE.jsonl       lines with `question` and `answer`, the latter as in GSM8K, or the bare answer
"""

import hashlib
import re
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from wrinklefree.core.errors import UserError
from wrinklefree.data import chains, sources
from wrinklefree.data.sources import Split

GSM8K = "openai/gsm8k"
MARK = "####"
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


class Problem(NamedTuple):
    """A question and its answer, named by its text: the same question is the same problem."""

    question: str
    gold: str

    @property
    def id(self) -> str:
        return hashlib.sha256(self.question.encode()).hexdigest()[:16]


def load(source: str, split: Split, count: int, num_heldout: int) -> list[Problem]:
    """`count` different problems at most, of one side of a split by problem: none is on both sides.

    A file's held-out side are `num_heldout` problems chosen by a hash; the hub's is its test split. Of mod7_chains
    those with one operation are on both sides (data/chains.py) and may occur again.
    Raises UserError where there is no such source, or no problem.
    """
    if source == chains.NAME:
        return [Problem(chain.question, chain.answer) for chain in chains.chains(split, count, seed=1)]
    if source == "gsm8k":
        stream = sources.load_hub("gsm8k", GSM8K, "main", "train" if split == "train" else "test", "a JSONL file")
        found = [_problem(row, f"gsm8k row {n}") for n, row in zip(range(count), stream, strict=False)]
    else:
        found = _deal(list(_read(Path(source))), split, num_heldout)
    if not found:
        raise UserError(f"thinking.pairs.problems={source}: no problem for the {split} split")
    return list(dict.fromkeys(found))[:count]


def _read(path: Path) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"thinking.pairs.problems={path}: no such file; give {chains.NAME}, gsm8k or a JSONL file")
    problems: list[Problem] = []

    def keep(row: sources.Row, where: str) -> str:
        problems.append(_problem(row, where))
        return ""

    for _ in sources.read(path, keep, piece=-1):
        pass
    return problems


def _problem(row: sources.Row, where: str) -> Problem:
    for column in ("question", "answer"):
        if not isinstance(row.get(column), (str, int, float)):
            raise UserError(f"{where}: a problem needs a {column!r}; there are {', '.join(map(str, row))}")
    return Problem(str(row["question"]).strip(), str(row["answer"]).rpartition(MARK)[2].strip())


def _deal(problems: list[Problem], split: Split, num_heldout: int) -> list[Problem]:
    """The problems with the lowest hashes are held out, half of them at most; the order of the file stays."""
    ids = sorted({problem.id for problem in problems})
    heldout = set(ids[: min(num_heldout, len(ids) // 2)])
    return [problem for problem in problems if (problem.id in heldout) == (split == "heldout")]


def same_answer(said: str, gold: str) -> bool:
    """Whether a text states the right answer: its last number, or its words where the answer is none.

    Commas, currency signs, a trailing dot and the form of a number make no difference: $1,200.0 is 1200, 1/2 is 0.5.
    What follows #### is taken where that stands in the text.
    """
    right = number(gold)
    text = said.rpartition(MARK)[2]
    if right is None:
        return text.strip().rstrip(".").casefold() == gold.strip().rstrip(".").casefold()
    found = _NUMBER.findall(text)
    return bool(found) and number(found[-1]) == right


def number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else, else None."""
    plain = text.strip().removesuffix(".")
    if not _NUMBER.fullmatch(plain):
        return None
    try:
        return Fraction(plain.replace(",", "").replace("$", ""))
    except (ValueError, ZeroDivisionError):  # a denominator of 0, 1.5/2, thousands of digits
        return None
