"""Problems are split by what they ask, and an answer is right by its value."""

import json
from pathlib import Path

import pytest

from wrinklefree.core.errors import UserError
from wrinklefree.data import problems
from wrinklefree.data.problems import same_answer


@pytest.mark.parametrize(
    ("said", "gold", "right"),
    [
        ("The answer is $1,200.", "1200", True),
        ("#### 72\n", "72", True),
        ("first 3, then 72", "72", True),
        ("72 apples, of which 3 are red", "72", False),
        ("0.5", "1/2", True),
        ("-4", "4", False),
        ("1.5/2", "3", False),
        ("nothing", "3", False),
        ("", "3", False),
        ("1/0", "0", False),
        ("9" * 6000, "9", False),
        ("Paris.", "paris", True),
        ("5", "1e999999999", False),
    ],
)
def test_an_answer_is_right_by_its_value(said: str, gold: str, right: bool) -> None:
    assert same_answer(said, gold) is right


def test_a_file_is_split_by_problem(tmp_path: Path) -> None:
    rows = [{"question": f"How much is {n % 30}?", "answer": f"it is\n#### {n % 30}"} for n in range(60)]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    train, heldout = (problems.load_problems(str(file), split, 100, 10) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (20, 10)
    assert not {p.id for p in train} & {p.id for p in heldout}
    assert all(p.question == f"How much is {p.gold}?" for p in train)


def test_what_is_no_problem_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    with pytest.raises(UserError, match=r"p.jsonl, row 2: a problem needs a 'answer'"):
        problems.load_problems(str(file), "train", 10, 1)
    with pytest.raises(UserError, match="no such file"):
        problems.load_problems("nowhere.jsonl", "train", 10, 1)
    file.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(UserError, match="no problem for the heldout split"):
        problems.load_problems(str(file), "heldout", 10, 1)
