"""Tasks to fine-tune on. A row becomes a question and an answer, with the prompts of lm-evaluation-harness.

    sst2, mnli, qnli     GLUE: the answer is a class, named by a word
    boolq, cb, rte, wic  SuperGLUE: the same
    copa                 SuperGLUE: the answer is one of the row's two sentences
    cnn_dailymail        the answer is a summary of a news article
    stdlib_kind          which package of Python's standard library is this code from? Needs no download
    mod7_chains          arithmetic in steps, with and without a written thought; needs no download

Local files have the same columns as the dataset on the hub. A label is its number or its name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import did_you_mean
from wrinklefree.data import chains, stdlib_kind
from wrinklefree.data.chat import columns, short
from wrinklefree.data.sources import Example, Row


@dataclass(frozen=True)
class Task:
    """Where a task's rows come from, and how a row becomes a prompt and an answer."""

    name: str
    path: str  # on the hub
    subset: str
    train: str  # name of a split
    heldout: str  # name of a split
    columns: tuple[str, ...]  # the prompt is made from these
    prompt: Callable[[Row], str]
    target: str  # the column with the answer
    classes: tuple[str, ...] = ()  # label names in the dataset's order
    words: tuple[str, ...] = ()  # the answer for each class
    answers: tuple[str, ...] = ()  # or the columns that hold it, if each row has its own
    numbers: tuple[str, ...] = ()  # columns of whole numbers that the prompt is made from, too


def _glue(name: str, heldout: str, columns: tuple[str, ...], prompt: Callable[[Row], str], **labels: str) -> Task:
    """Return a task of GLUE. `labels` maps each class to the word that answers it, in the dataset's order."""
    classes, words = tuple(labels), tuple(labels.values())
    return Task(name, "nyu-mll/glue", name, "train", heldout, columns, prompt, "label", classes, words)


def _superglue(name: str, columns: tuple[str, ...], prompt: Callable[[Row], str], labels: dict[str, str]) -> Task:
    """Return a task of SuperGLUE. `labels` maps each class to the word that answers it, in the dataset's order."""
    classes, words = tuple(labels), tuple(labels.values())
    return Task(name, "aps/super_glue", name, "train", "validation", columns, prompt, "label", classes, words)


TASKS = {
    task.name: task
    for task in (
        _glue(
            "sst2",
            "validation",
            ("sentence",),
            lambda row: f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            negative="negative",
            positive="positive",
        ),
        _glue(
            "mnli",
            "validation_matched",
            ("premise", "hypothesis"),
            lambda row: (
                f"{row['premise']}\nQuestion: {_as_statement(row['hypothesis'])} True, False or Neither?\nAnswer:"
            ),
            entailment="True",
            neutral="Neither",
            contradiction="False",
        ),
        _glue(
            "qnli",
            "validation",
            ("question", "sentence"),
            lambda row: (
                f"{row['question']}\n{row['sentence']}\nQuestion: Does this response answer the question?\nAnswer:"
            ),
            entailment="yes",
            not_entailment="no",
        ),
        _superglue(
            "boolq",
            ("passage", "question"),
            lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
            {"False": "no", "True": "yes"},
        ),
        _superglue(
            "cb",
            ("premise", "hypothesis"),
            lambda row: f"{row['premise']}\nQuestion: {row['hypothesis']}. True, False, or Neither?\nAnswer:",
            {"entailment": "True", "contradiction": "False", "neutral": "Neither"},
        ),
        _superglue(
            "rte",
            ("premise", "hypothesis"),
            lambda row: f"{row['premise']}\nQuestion: {row['hypothesis']} True or False?\nAnswer:",
            {"entailment": "True", "not_entailment": "False"},
        ),
        Task(
            *("wic", "aps/super_glue", "wic", "train", "validation"),
            ("sentence1", "sentence2"),
            lambda row: (
                f"Sentence 1: {row['sentence1']}\nSentence 2: {row['sentence2']}\nQuestion: Is the word "
                f"'{row['sentence1'][row['start1'] : row['end1']]}' used in the same way in the two sentences above?\n"
                "Answer:"
            ),
            "label",
            ("False", "True"),
            ("no", "yes"),
            numbers=("start1", "end1"),
        ),
        Task(
            *("copa", "aps/super_glue", "copa", "train", "validation"),
            ("premise", "question", "choice1", "choice2"),
            lambda row: f"{row['premise'].strip()[:-1]} {'because' if row['question'] == 'cause' else 'therefore'}",
            "label",
            ("choice1", "choice2"),
            answers=("choice1", "choice2"),
        ),
        Task(
            "cnn_dailymail",
            "abisee/cnn_dailymail",
            "3.0.0",
            "train",
            "validation",
            ("article",),
            lambda row: f"Summarize the following article:\n\n{row['article']}\n\nSummary:",
            "highlights",
        ),
    )
}

BUILTIN = {stdlib_kind.NAME: stdlib_kind.examples, chains.NAME: chains.examples}


def _as_statement(hypothesis: str) -> str:
    """End the text with a full stop, unless it has one."""
    text = hypothesis.strip()
    return text if text.endswith(".") else f"{text}."


def find_task(name: str | None) -> Task:
    """Return the one of `TASKS` with this name. Raises UserError if there is none, or if `name` is None."""
    known = [*TASKS, *BUILTIN]
    if name is None:
        raise UserError(f"data.task: a value is required: one of {', '.join(known)}")
    if name not in TASKS:
        raise UserError(f"data.task={name}: no such task{did_you_mean(name, known)}; there are {', '.join(known)}")
    return TASKS[name]


def render(task: Task, row: Row, where: str) -> Example:
    """Return a row as prompt and answer. A row labelled -1, as in test splits, gives an empty example.

    Raises UserError, beginning with `where`, if a column is missing or holds no text, or if a label is unknown.
    """
    missing = [column for column in (*task.columns, *task.numbers, task.target) if column not in row]
    if missing:
        raise UserError(f"{where}: no column {missing[0]!r}, which {task.name} needs; there are {columns(row)}")
    row = dict(row) | {column: _number(row[column]) for column in task.numbers}
    texts = task.columns if task.classes else (*task.columns, task.target)
    wrong = [column for column in texts if not isinstance(row[column], str)]
    if wrong:
        raise UserError(f"{where}: column {wrong[0]!r} holds {type(row[wrong[0]]).__name__}, not text")
    wrong = [column for column in task.numbers if not isinstance(row[column], int)]
    if wrong:
        raise UserError(f"{where}: column {wrong[0]!r} holds {type(row[wrong[0]]).__name__}, not a whole number")
    # The space before the answer belongs to the answer, as the harness scores it: training sees the same tokens.
    if not task.classes:
        return Example(task.prompt(row), f" {row[task.target]}")
    label = _number(row[task.target])
    if label == -1:
        return Example("", "")
    choices = tuple(f" {word}" for word in task.words or [row[column] for column in task.answers])
    return Example(task.prompt(row), choices[_class(task, label, where)], choices)


def _number(label: object) -> object:
    """Return a label as a number if it is the text of one, as in CSV."""
    return int(label) if isinstance(label, str) and label.removeprefix("-").isdecimal() else label


def _class(task: Task, label: object, where: str) -> int:
    """Return a label's number; `label` is that number, or the class's name. Raises UserError for anything else."""
    known = [*range(len(task.classes)), *task.classes]
    if label not in known:
        names = ", ".join(task.classes)
        raise UserError(f"{where}: label {short(label)}; {task.name} has {names}, or 0 to {len(task.classes) - 1}")
    return known.index(label) % len(task.classes)
