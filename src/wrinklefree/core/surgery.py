"""Find modules and parameters in a model by their fully qualified name (fqn)."""

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from torch import nn

from wrinklefree.core.errors import UserError
from wrinklefree.core.turned import TurnedLinear


def matches(fqn: str, patterns: Iterable[str]) -> bool:
    """Whether any glob in `patterns` matches `fqn`, or consecutive whole components inside it.

    | pattern | matches |
    |---|---|
    | `lm_head` | `lm_head`, `decoder.lm_head` |
    | `layers.0` | everything in layer 0 |
    | `*.down_proj` | every `down_proj` |
    | `wte` | `wte`, but not `wte_proj` |
    """
    return any(fnmatch.fnmatchcase(f".{fqn}.", f"*.{pattern}.*") for pattern in patterns)


def linears(model: nn.Module, exclude: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """Yield (fqn, module) for every `nn.Linear` that no pattern matches. Subclasses are skipped, but `TurnedLinear`."""
    patterns = list(exclude)
    for fqn, module in list(model.named_modules()):
        if type(module) in (nn.Linear, TurnedLinear) and not matches(fqn, patterns):
            yield fqn, module


@runtime_checkable
class Configured(Protocol):
    """A model of transformers, or a part of one, as far as it matters here."""

    config: Any


def language_part(model: nn.Module) -> tuple[str, nn.Module]:
    """The part of a model that reads text, and its fqn: all of it, unless it has others for images or sounds."""
    if isinstance(model, Configured):
        whole: Any = model
        text = whole.config.get_text_config()
        for fqn, part in model.named_modules():
            module: Any = part
            if isinstance(module, Configured) and module.config is text:
                return fqn, part
    return "", model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, first to last: its longest `nn.ModuleList`, but experts.

    Raises UserError if the model has no `nn.ModuleList`.
    """
    lists = [module for module in language_part(model)[1].modules() if type(module) is nn.ModuleList]
    if not lists:
        raise UserError(f"{type(model).__name__}: has no list of decoder layers")
    return max(lists, key=len)


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Turn off training for every parameter that a pattern matches.

    Raises UserError if a pattern matches no parameter.
    """
    named = list(model.named_parameters(remove_duplicate=False))  # a tied weight has two names, and either may be given
    for pattern in patterns:
        frozen = [p for name, p in named if matches(name, [pattern])]
        if not frozen:
            raise UserError(f"training.freeze_names: {pattern!r} matches no parameter of {type(model).__name__}")
        for parameter in frozen:
            parameter.requires_grad_(False)
