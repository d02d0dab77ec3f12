"""Finds where a loss that is not finite comes from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from wrinklefree.distributed import sharding
from wrinklefree.distributed.world import World, any_of, gather
from wrinklefree.training import checkpoint
from wrinklefree.training.state import TrainingState


def explain_nonfinite(run: TrainingState, loss: float) -> str:
    """Return an error message: the step, the first bad tensor, the last good checkpoint, and what to try."""
    newest = checkpoint.step_folders(run.out / "checkpoints")
    good = f"last good checkpoint: {newest[-1]}" if newest else "no checkpoint was saved yet"
    return f"step {run.step + 1}: loss is {loss}, {_first_nonfinite(run)}; {good}; try a lower training.lr"


@torch.no_grad()
def _first_nonfinite(run: TrainingState) -> str:
    """Say where values that are not finite first appear: in weights, else in a layer's output, else in gradients.

    The forward pass of the last batch is run again, with a hook on every innermost module.
    """
    for name, parameter in run.model.named_parameters():
        if not _finite(parameter, run.world):
            return f"weight {name} is not finite"
    with _first_bad_output(run.model) as bad, run.autocast():
        run.placement.with_whole_parameters(lambda: [None for _ in run.objective(run.last_batch)])
    first = [name for names in gather(bad[:1], run.world) for name in names]
    if first:
        return f"layer {first[0]} gives values that are not finite"
    grads = [n for n, p in run.model.named_parameters() if p.grad is not None and not _finite(p.grad, run.world)]
    return f"gradient of {grads[-1]} is not finite" if grads else "the loss itself overflows"


def _finite(tensor: Tensor, world: World) -> bool:
    """Whether every process has a finite tensor, or a finite share of it."""
    return not any_of(not sharding.local(tensor).isfinite().all().item(), world)


@contextmanager
def _first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """While the block runs, collect the names of innermost modules whose output is not finite, in forward order."""
    bad: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                bad.append(name)

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if not any(m.children())]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()
