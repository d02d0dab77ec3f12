"""Finding and replacing modules of a model by their fully qualified name (fqn)."""

import fnmatch
from collections.abc import Iterable, Iterator

from torch import nn

from wrinklefree.core.errors import UserError


def matches(fqn: str, patterns: Iterable[str]) -> bool:
    """Whether a glob matches `fqn` or a run of whole components of it.

    `lm_head` matches `lm_head` and `decoder.lm_head`, `layers.0` all of layer 0, `*.down_proj` every `down_proj`;
    `wte` does not match `wte_proj`.
    """
    return any(fnmatch.fnmatchcase(f".{fqn}.", f"*.{pattern}.*") for pattern in patterns)


def linears(model: nn.Module, exclude: Iterable[str]) -> Iterator[tuple[str, nn.Linear]]:
    """(fqn, module) of every plain `nn.Linear` whose fqn no pattern matches; subclasses are left alone."""
    patterns = list(exclude)
    for fqn, module in list(model.named_modules()):
        if type(module) is nn.Linear and not matches(fqn, patterns):
            yield fqn, module


def unconvertible(model: nn.Module, exclude: Iterable[str]) -> list[str]:
    """Names of matrix parameters that are held by something else than a linear layer or an embedding.

    Fused 3-D experts and GPT-2's transposed `Conv1D` are such: a method must name them, never keep them in silence.
    """
    patterns = list(exclude)
    return [
        f"{fqn}.{name}"
        for fqn, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not isinstance(module, (nn.Linear, nn.Embedding)) and not matches(fqn, patterns)
    ]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal language model, first to last: its longest list of modules.

    Raises UserError where it has none.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise UserError(f"{type(model).__name__}: has no list of decoder layers")
    return max(lists, key=len)


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Train nothing that a pattern matches. Raises UserError for one that matches no parameter."""
    named = list(model.named_parameters(remove_duplicate=False))  # tied weights go by either name
    for pattern in patterns:
        frozen = [p for name, p in named if matches(name, [pattern])]
        if not frozen:
            raise UserError(f"training.freeze_names: {pattern!r} matches no parameter of {type(model).__name__}")
        for parameter in frozen:
            parameter.requires_grad_(False)
