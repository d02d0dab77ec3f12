"""Troubleshooting quotes messages that the code prints, and the glossary has the words that pages use."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")

GAP = "\0"  # a name or number that is filled in


@cache
def texts() -> list[str]:
    """All texts in the source, with GAP for what is filled in."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else GAP for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(\.\d)?[sdgf]", GAP, node.value).replace("%%", "%"))
    return found


def is_printed(message: str) -> bool:
    """Whether one text of the source has all words of a message, in their order, where it has no `...`."""
    parts = [part for part in message.split("...") if part.strip()]
    pattern = re.compile(".*".join(map(re.escape, parts)), re.DOTALL)
    return any(pattern.search(text) or pattern.search(text.replace(GAP, "")) for text in texts())


def messages() -> list[str]:
    sections = TROUBLE.partition("\n## No message")[0]
    rows = re.findall(r"^\| (.*?) \| .*\|$", sections, re.MULTILINE)
    return [row for row in rows if row not in ("message", "") and not row.startswith("---")]


@pytest.mark.parametrize("row", messages())
def test_an_entry_is_a_message_of_the_code(row: str) -> None:
    quoted = re.fullmatch(r"`([^`]+)`", row)
    assert quoted, "an entry is one message in backticks"
    assert len(re.findall(r"[A-Za-z]{2,}", quoted[1])) >= 2
    assert is_printed(quoted[1])


def test_a_message_that_nothing_prints_is_found_out() -> None:
    assert not is_printed("the flux of the ... is too high")
    assert not is_printed("free some space: disk full while writing")  # the right words, turned round
    assert len(messages()) > 40


def words() -> list[str]:
    return re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", GLOSSARY, re.MULTILINE)[1:]


@pytest.mark.parametrize("word", ["KL", "one-shot", "master", "SubLN", "block-wise", "rotation", "coverage", "packed"])
def test_the_glossary_explains(word: str) -> None:
    assert word in words()


def test_the_glossary_is_in_order_and_has_each_word_once() -> None:
    found = [word.lower() for word in words()]
    assert found == sorted(set(found))


def test_every_figure_of_the_report_is_explained() -> None:
    """A reader of the table at the end of a run finds its rows and columns there."""
    for word in ("full precision", "one-shot", "rebuilt", "perplexity", "KL", "whole file", "bits per weight"):
        assert word in words()
