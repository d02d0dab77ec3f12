"""What one of several processes does for the tests: toy runs, one after the other in one torchrun.

    torchrun --nproc_per_node=2 tests/processes.py FOLDER

FOLDER holds a toy model, text and `jobs.json`, a list of {name, settings, act}. Each job trains into FOLDER/name; the
process writes FOLDER/name.RANK.json: the error it ended with, and what its parameters look like.
"""

import errno
import json
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from toyrun import resolved, run
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core import files
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.distributed.world import World, barrier, join_world, leave_world
from wrinklefree.objectives.base import Metrics, Objective
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.runs.setup import Run
from wrinklefree.training.loop import do_nothing


def act_for(kind: str | None, world: World) -> Callable[[nn.Module, int], None]:
    """An `on_step` that does something to the last process alone, before its third step."""

    def act(model: nn.Module, step: int) -> None:
        if step != 2 or world.rank != world.size - 1:
            return
        if kind == "interrupt":
            signal.raise_signal(signal.SIGINT)
        elif kind == "overflow":
            layer = model.get_submodule("model.layers.1.mlp.down_proj")
            layer.register_forward_hook(lambda module, inputs, output: output * math.inf)
        elif kind == "fill":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    return do_nothing if kind in (None, "twice", "unreadable") else act


class Unreadable(Iterator[Batch]):
    """A stream whose third batch cannot be read."""

    skipped = 0

    def __init__(self, stream: Any) -> None:
        self.stream, self.served = stream, 0

    def __next__(self) -> Batch:
        self.served += 1
        if self.served == 3:
            raise UserError("rows.jsonl, line 7: not JSON")
        batch: Batch = next(self.stream)
        return batch

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.stream.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state)


def twice(student: PreTrainedModel, teacher: PreTrainedModel) -> Objective:
    """An objective of two losses a batch, of which each is a step of the accumulation."""

    class Twice(LanguageModelling):
        def __call__(self, batch: Batch) -> Iterator[tuple[torch.Tensor, Metrics]]:
            yield from super().__call__(batch)
            yield from super().__call__({**batch, "labels": batch["labels"].clamp(max=90)})

    return Twice(student, DistillationConfig(name="none"))


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """How much of the model is here, and how FSDP was told to treat its layers."""
    parameters = list(model.parameters())
    local = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    found = {
        "sharded": all(isinstance(p, DTensor) for p in parameters),
        "here": sum(p.numel() for p in local),
        "whole": sum(p.numel() for p in parameters),
    }
    for number, layer in enumerate(m for m in model.modules() if isinstance(m, FSDPModule)):
        state = layer._get_fsdp_state()
        found[f"offload {number}"] = type(state._fsdp_param_group.offload_policy).__name__
        found[f"ahead {number}"] = len(state._states_to_forward_prefetch)
        found[f"behind {number}"] = len(state._states_to_backward_prefetch)
    return found


def work(folder: Path, job: dict[str, Any], world: World) -> None:
    config = resolved(folder, f"output_dir={folder / job['name']}", "training.batch_size=2", *job["settings"])
    result: dict[str, Any] = {"error": None, "kept": 0}
    act = act_for(job["act"], world)

    def on_step(model: nn.Module, step: int) -> None:
        result["kept"] += sum(layer.effective.leaf is not None for layer in quant_layers(model).values())
        act(model, step)

    stream = Run.stream
    if job["act"] == "unreadable" and world.rank == world.size - 1:
        Run.stream = lambda self: Unreadable(stream(self))  # type: ignore[assignment,method-assign,return-value]
    try:
        objective = twice if job["act"] == "twice" else None
        model = run(config, on_step=on_step, world=world, objective=objective)
        result |= facts(model)
    except UserError as error:
        result["error"] = str(error)
    Run.stream = stream  # type: ignore[method-assign]
    (folder / f"{job['name']}.{world.rank}.json").write_text(json.dumps(result))


def main() -> None:
    warnings.simplefilter("error")
    files.FULL = (errno.EFBIG,)  # a limit on the size of a file stands for the disk's
    signal.signal(signal.SIGINT, signal.default_int_handler)
    world, folder = join_world(), Path(sys.argv[1])
    for job in json.loads((folder / "jobs.json").read_text()):
        work(folder, job, world)
        barrier(world)
    leave_world()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as `wf` does it, and why


if __name__ == "__main__":
    main()
