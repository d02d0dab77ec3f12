"""Find modules and parameters in a model by their fully qualified name (fqn)."""

import fnmatch
from collections.abc import Iterable, Iterator

from torch import nn

from wrinklefree.core.errors import UserError


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
    """Yield (fqn, module) for every `nn.Linear` that no pattern matches. Subclasses of `nn.Linear` are skipped."""
    patterns = list(exclude)
    for fqn, module in list(model.named_modules()):
        if type(module) is nn.Linear and not matches(fqn, patterns):
            yield fqn, module


def unconvertible(model: nn.Module, exclude: Iterable[str]) -> list[str]:
    """Names of weights with two or more dimensions that are in neither an `nn.Linear` nor an embedding.

    Examples are fused 3-D experts and GPT-2's transposed `Conv1D`. No method converts them, so a method warns that
    they stay in full precision.
    """
    patterns = list(exclude)
    return [
        f"{fqn}.{name}"
        for fqn, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not isinstance(module, (nn.Linear, nn.Embedding)) and not matches(fqn, patterns)
    ]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, first to last: its longest `nn.ModuleList`.

    Raises UserError if the model has no `nn.ModuleList`.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
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
