"""A verb's model in any form: `-m NAME`, `--model NAME`, `model=NAME`, or in its place among the arguments.

Every verb has one form of its own: an option, a setting, or an argument. The others are rewritten to it here.
"""

from collections.abc import Iterator
from typing import Any

import typer

# Typer exports only this one of Click's errors; what it builds on is the one for a line that cannot be read.
UsageError: Any = typer.BadParameter.__base__

FLAGS = ("-m", "--model")
PLACES = ("path", "paths", "run")  # arguments that are models, always the last of a verb

# What a word is: one of the options with its value, an argument, "--", or a model in one of three forms.
OPTION, ARGUMENT, DASHES, BY_FLAG, BY_KEY = "option", "argument", "--", "-m NAME", "model=NAME"


def as_it_takes_it(command: Any, args: list[str]) -> list[str]:
    """The words behind a verb, with its model in the form that the verb's parser knows.

    Raises UsageError if two forms name different models.
    """
    options = {name: p for p in command.params if p.param_type_name == "option" for name in p.opts}
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    found = list(_read(options, args))
    named = {kind: text for kind, text in found if kind in (BY_FLAG, BY_KEY)}
    if not named:
        return args
    if "--model" in options:
        return _as_words(found, ["--model", _agreed(named)])
    if "overrides" in [argument.name for argument in arguments]:
        return _as_words(found, [f"model={_agreed(named)}"])
    if arguments and arguments[-1].name in PLACES:
        return _in_place(found, arguments)
    return args


def _read(options: dict[str, Any], args: list[str]) -> Iterator[tuple[str, str]]:
    """What each word is, and the word itself; of a model, its name."""
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if word == "--":
            yield DASHES, word
            yield from ((ARGUMENT, each) for each in rest)
            return
        if word in FLAGS and rest:
            yield BY_FLAG, rest.pop(0)
        elif word.startswith("--model="):
            yield BY_FLAG, word.removeprefix("--model=")
        elif word.startswith("model="):
            yield BY_KEY, word.removeprefix("model=")
        elif word.startswith("-"):
            yield OPTION, word
            if word in options and not options[word].is_flag and rest:
                yield OPTION, rest.pop(0)  # its value, whatever it looks like
        else:
            yield ARGUMENT, word


def _agreed(named: dict[str, str]) -> str:
    """The one model that all forms name. Of several in the same form, the last counts, as for every option."""
    names = list(dict.fromkeys(named.values()))
    if len(names) > 1:
        given = " and ".join(kind.replace("NAME", name) for kind, name in named.items())
        raise UsageError(f"{given}: which model? Give one of them")
    return names[0]


def _as_words(found: list[tuple[str, str]], model: list[str]) -> list[str]:
    """All words in their order, with `model` where a model was named first."""
    words, rest = list[str](), model
    for kind, text in found:
        if kind in (BY_FLAG, BY_KEY):
            words, rest = [*words, *rest], []
        else:
            words.append(text)
    return words


def _in_place(found: list[tuple[str, str]], arguments: list[Any]) -> list[str]:
    """All words, with the model as the last argument. A verb that takes several models takes them in any form."""
    given = [text for kind, text in found if kind == ARGUMENT]
    named = {kind: text for kind, text in found if kind in (BY_FLAG, BY_KEY)}
    if arguments[-1].nargs == -1:
        places = list(dict.fromkeys(text for kind, text in found if kind == ARGUMENT or kind in named))
    elif len(given) < len(arguments):
        places = [*given, _agreed(named)]
    else:
        places = [*given[:-1], _agreed({"NAME": given[-1], **named})]
    options = [text for kind, text in found if kind == OPTION]
    dashes = [text for kind, text in found if kind == DASHES]
    return [*options, *dashes, *places] if dashes else [*places, *options]  # an option without its value stays last
