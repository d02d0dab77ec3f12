"""What was probably meant by a verb or an option that does not exist."""

from collections.abc import Iterable
from typing import Any

from wrinklefree.core.text import did_you_mean

# Verbs of other programs, and what does the same here.
ELSEWHERE = {
    "quantize": "`wf fairy2` quantizes, as do bitdistill and anemll; `wf methods` lists all",
    "chat": "`wf generate PATH -i` answers line by line",
    "list": "`wf runs` lists runs, and `wf methods` what can be chosen by name",
    "info": "`wf doctor` describes this machine, `wf runs` lists runs",
    "help": "wf --help, or wf VERB --help",
    "version": "wf --version",
    "finetune": "`wf train` trains with any method, or with training=full_precision",
    "benchmark": "`wf eval` measures one model, `wf compare` methods side by side",
}


def no_such_verb(name: str, known: Iterable[str]) -> str:
    """The message for a verb that does not exist."""
    hint = ELSEWHERE.get(name.lower())
    return f"No such command {name!r}{f': {hint}' if hint else did_you_mean(name, known)}"


def with_best_guess(error: Any) -> None:
    """Let Click's error about an unknown option name the closest one only. Click lists all in alphabetical order."""
    close = vars(error).get("possibilities")  # the best comes first; other errors have none
    if close:
        error.message, error.possibilities = f"{error.message} (did you mean '{close[0]}'?)", None
