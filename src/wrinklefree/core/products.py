"""Finds what a model multiplies with, by running it on a few tokens: its linear layers, whatever their class.

| what the model does | what becomes of the weight |
|---|---|
| calls a module that multiplies its input with a weight [out, in] | quantized |
| the same with a weight [in, out] (GPT-2's `Conv1D`) | quantized, and saved as the model has it |
| multiplies with slices of a tensor [E, out, in] or [E, in, out] (experts) | quantized, each slice by itself |
| calls the module to choose experts, or for a single number | stays in full precision |
| reads the weight, and does not call the module (Mamba's `dt_proj`) | stays in full precision |
| uses the block, but neither module nor weight (BART's attention to an encoder) | quantized as it is |
"""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wrinklefree.core import stack, surgery
from wrinklefree.core.errors import UserError
from wrinklefree.core.turned import TurnedLinear

log = logging.getLogger("wrinklefree")

TOKENS = 8  # on which a model is tried
PLAIN = (nn.Linear, TurnedLinear)  # subclasses may do more
SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
CLOSE = 1e-3  # of an output to the product, relative to the largest number in it


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model of transformers, as far as it matters here."""

    def get_output_embeddings(self) -> nn.Module | None: ...

    def set_experts_implementation(self, experts_implementation: str) -> None: ...


def open_products(model: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Linear]:
    """Return all layers to quantize by fqn, and make plain linear layers of those that are none, in place.

    Layers that match a pattern in `exclude` are left as they are; `lm_head` means the output head under any name.
    Raises UserError if the model writes into its own weights.
    """
    patterns, uncalled = list(exclude), set[str]()
    if isinstance(model, LanguageModel) and not any(p.is_meta for p in model.parameters()):
        model.set_experts_implementation("eager")  # the others multiply with all experts at once
        uncalled = _open(model, Probe(model), patterns)
    head = output_head(model)
    return {
        fqn: linear
        for fqn, linear in surgery.linears(model, patterns)
        if not (linear is head and "lm_head" in patterns)
        and not (fqn in uncalled or linear.out_features == 1 or _chooses_experts(model, fqn, linear))
    }


def output_head(model: nn.Module) -> nn.Module | None:
    """The output head of a language model, whatever its name; None for other modules."""
    return model.get_output_embeddings() if isinstance(model, LanguageModel) else None


def _chooses_experts(model: nn.Module, fqn: str, linear: nn.Linear) -> bool:
    """Whether the layer has one output for each of the experts beside it."""
    parent = fqn.rpartition(".")[0]
    beside = (model.get_submodule(path) for path in {parent, parent.rpartition(".")[0]} if path)
    return any(_has_experts(module, linear.out_features) for module in beside)


def _has_experts(module: nn.Module, number: int) -> bool:
    inner = [each for each in module.modules() if not isinstance(each, nn.Conv1d)]  # its filters are 3-D, too
    lists = any(isinstance(each, nn.ModuleList) and len(each) == number for each in inner)
    return lists or any(p.ndim == 3 and len(p) == number for each in inner for p in each.parameters(recurse=False))


class Probe:
    """What a model does with its weights in a forward pass over a few tokens, in training and in evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self.called: list[set[str]] = []  # modules whose forward was called and gave a tensor, for each pass
        self.kinds: dict[str, str] = {}  # by fqn of a module: `linear`, `turned` or `other`
        self.uses = Uses({id(p): fqn for fqn, p in model.named_parameters() if p.ndim == 3})
        matrices = {fqn: m.weight for fqn, m in model.named_modules() if _has_matrix(m)}
        training, before = model.training, {name: p._version for name, p in model.named_parameters()}
        for mode in (True, False):
            self.called.append(set())
            with self._watching(model.train(mode)), torch.random.fork_rng([]), torch.no_grad(), self.uses:
                ids = torch.arange(TOKENS, device=next(model.parameters()).device).unsqueeze(0)
                model(input_ids=ids, use_cache=False)
        model.train(training)
        self.used = {role(fqn) for fqn, weight in matrices.items() if id(weight) in self.uses.seen}
        written = [name for name, p in model.named_parameters() if p._version != before[name]]
        if written:
            raise UserError(
                f"{type(model).__name__}: its forward pass writes into its weights ({role(written[0])}), so quantized "
                f"layers cannot stand in for them"
            )

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        modules = {fqn: m for fqn, m in model.named_modules() if _has_matrix(m)}
        handles = [m.register_forward_hook(partial(self._see, fqn)) for fqn, m in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, fqn: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            self.called[-1].add(role(fqn))
            if fqn not in self.kinds:
                self.kinds[fqn] = _kind(module, inputs[0], output)

    def spares(self, fqn: str) -> bool:
        """Whether nothing uses the module's weight, though its block is used: cross-attention without an encoder."""
        block = re.sub(r"(.*\*)\..*", r"\1.", role(fqn))
        return role(fqn) not in self.used and any(name.startswith(block) for name in self.used)

    def calls(self, fqn: str) -> bool:
        """Whether every pass called the module, or one with the same role: few tokens do not see all experts."""
        return all(role(fqn) in called for called in self.called)


class Uses(TorchFunctionMode):
    """Records how tensors of experts are used, and which tensors are used at all."""

    def __init__(self, tensors: dict[int, str]) -> None:
        super().__init__()
        self.tensors = tensors  # fqn by id
        self.slices: dict[int, tuple[str, Tensor]] = {}  # by id; the tensor is kept, so that its id stays its own
        self.found: dict[str, set[str]] = {}  # by fqn: `linear`, `turned`, or anything else
        self.seen: set[int] = set()  # ids of what was given to a function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func == SHAPE:
            return result
        if func is Tensor.__getitem__ and id(args[0]) in self.tensors and result.ndim == 2:
            self.slices[id(result)] = self.tensors[id(args[0])], result
            return result
        for value in (*args, *(kwargs or {}).values()):
            self.seen.update(map(id, value if isinstance(value, list | tuple) else [value]))
        for place, value in enumerate(args):
            whole = self.tensors.get(id(value))
            fqn = whole or self.slices.get(id(value), (None,))[0]
            if fqn is not None:
                self.found.setdefault(fqn, set()).add(_use(func, place, kwargs, whole is not None))
        return result


def _use(func: Any, place: int, kwargs: Any, whole: bool) -> str:
    if place != 1 or kwargs:
        return "other"
    if func in (stack.BATCHED if whole else stack.MATMUL):
        return "turned"
    return "linear" if func in stack.LINEAR else "other"


def role(fqn: str) -> str:
    """A name without its numbers: layers with the same role do the same work."""
    return ".".join("*" if part.isdigit() else part for part in fqn.split("."))


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _kind(module: nn.Module, x: Tensor, output: Tensor) -> str:
    """What the module has done with `x` [..., in]: `linear`, `turned` (a weight [in, out]) or `other`."""
    if type(module) in PLAIN:
        return "linear"
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    for kind, matrix in (("linear", weight), ("turned", weight.T)):
        if matrix.shape == (output.shape[-1], x.shape[-1]) and _close(F.linear(x, matrix, bias), output):
            return kind
    return "other"


def _close(found: Tensor, expected: Tensor) -> bool:
    same = found.shape == expected.shape
    return same and bool((found - expected).abs().max() <= CLOSE * expected.abs().max().clamp_min(1e-6))


def _open(model: nn.Module, probe: Probe, patterns: list[str]) -> set[str]:
    """Make linear layers of all that multiply as these do. Return the linear layers that are never called."""
    uncalled, spared = set(), set()
    for fqn, module in list(model.named_modules()):
        if not _has_matrix(module) or surgery.matches(fqn, patterns) or module is output_head(model):
            continue
        if type(module) in PLAIN and probe.spares(fqn):
            spared.add(fqn)
        elif not probe.calls(fqn):
            uncalled.add(fqn)
        elif type(module) not in PLAIN and probe.kinds.get(fqn) in ("linear", "turned"):
            model.set_submodule(fqn, _linear(module, probe.kinds[fqn] == "turned"))
    for fqn, uses in probe.uses.found.items():
        if uses in ({"linear"}, {"turned"}) and not surgery.matches(fqn, patterns):
            weight = model.get_parameter(fqn)
            stack.open_stacks(model, {fqn: len(weight)})
            for number, matrix in enumerate(weight.detach()):
                model.set_submodule(f"{fqn}.{number}", _expert(matrix, uses == {"turned"}, weight))
    for layers, said in (
        (uncalled, "in full precision, because the model does not call these layers: %s"),
        (spared, "quantized as they are, because text alone does not use these layers: %s"),
    ):
        if layers:
            log.warning(said, short(dict.fromkeys(map(role, sorted(layers)))))
    return uncalled


def _linear(module: nn.Module, turned: bool) -> nn.Linear:
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    if turned:
        return TurnedLinear(weight, bias).train(module.training)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear.train(module.training)


def _expert(matrix: Tensor, turned: bool, like: nn.Parameter) -> nn.Linear:
    if turned:
        return TurnedLinear(nn.Parameter(matrix, like.requires_grad), None)
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(matrix.clone(), like.requires_grad)
    return linear


def uncovered(model: nn.Module, exclude: Iterable[str], quantized: Iterable[nn.Module]) -> dict[str, int]:
    """The weights of blocks in full precision that no pattern in `exclude` matches: their numbers of entries by role.

    Weights of blocks are parameters of two or more dimensions, but those of embeddings and of the output head.
    The largest come first.
    """
    patterns, inside = list(exclude), {id(p) for m in quantized for p in m.parameters()}
    found: dict[str, int] = {}
    for name, parameter in blocks(model).items():
        if id(parameter) not in inside and not surgery.matches(name.rpartition(".")[0], patterns):
            found[role(name)] = found.get(role(name), 0) + parameter.numel()
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def blocks(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of two or more dimensions by name, but those of embeddings and of the output head.

    Of a model for images and text, these are the text's.
    """
    head, part = output_head(model), surgery.language_part(model)[0]
    outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside |= set() if head is None else {id(p) for p in head.parameters(recurse=False)}
    inside = (item for item in model.named_parameters() if item[0].startswith(f"{part}." if part else ""))
    return {name: p for name, p in inside if p.ndim >= 2 and id(p) not in outside}


def short(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(re.sub(r"\.weight$", "", name) for name in listed[:3]) + more
