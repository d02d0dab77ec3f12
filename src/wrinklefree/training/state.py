"""What changes while a model trains, and the part of it that a checkpoint keeps."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import TrainingConfig
from wrinklefree.core import replaced
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.sharding import Sharded, Whole
from wrinklefree.distributed.world import World, gather
from wrinklefree.objectives.base import Objective
from wrinklefree.training import checkpoint, saved_state
from wrinklefree.training.budget import Budget, Pace
from wrinklefree.training.plan import Plan
from wrinklefree.training.uploads import Uploads


class Stream(Protocol):
    """Training batches without end. Its state is an exact position to continue from, also after it raised UserError."""

    @property
    def skipped(self) -> int:
        """How many bad rows were left out so far."""

    def __iter__(self) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainingState:
    """One training in progress: its model, optimizers, data and counters."""

    model: PreTrainedModel
    objective: Objective
    stream: Stream
    training: TrainingConfig
    plan: Plan
    world: World
    placement: Whole
    optimizers: list[Optimizer]
    out: Path
    tokenizer: PreTrainedTokenizerBase
    settings: str  # the resolved config as YAML, for checkpoints
    step: int = 0
    tokens: int = 0
    planned: int = 0  # the tokens that the plan has counted; `tokens` differs if batches differ in length
    best_loss: float = math.inf
    best_step: int | None = None  # the step of the model in best/, if `keep_best`
    saved_best_step: int | None = None  # what the newest checkpoint says of it
    stale: int = 0  # evaluations in a row without a better one
    last_batch: Batch = field(default_factory=dict)
    uploads: Uploads | None = None  # the main process has one, if `training.upload_to` is set
    budget: Budget | None = None  # the minutes that the training has to fit into
    pace: Pace = field(default_factory=Pace)

    def state(self) -> saved_state.State:
        """Return what a checkpoint keeps beside the weights. Every process has to call this."""
        return {
            "step": self.step,
            "tokens": self.tokens,
            "planned": self.planned,
            "best_loss": self.best_loss,
            "best_step": self.best_step,
            "stale": self.stale,
            "budget": None if self.budget is None else self.budget.state(self.plan, self.pace.means),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "stream": self.stream.state_dict(),  # the same on every process
            "rng": gather(torch.get_rng_state(), self.world),
        }

    def load_state(self, path: Path) -> None:
        """Take over the state of the checkpoint in `path`, whatever number of processes saved it.

        Raises UserError if it is broken, or if it does not fit this run's optimizers or data.
        """
        state = saved_state.load_state(path)
        self.step, self.tokens, self.best_loss = state["step"], state["tokens"], state["best_loss"]
        # Version 0.1 did not save these.
        self.stale, self.best_step = state.get("stale", 0), state.get("best_step")
        self.planned = state.get("planned", self.tokens)
        self.plan = self.plan.resumed(self.step, self.planned)
        if self.budget is not None:
            self.plan = self.budget.resumed(self.plan, state.get("budget"), self.pace)
        try:
            saved_state.place_moments(path, state, self.optimizers)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                _load_optimizer(optimizer, saved)
        except ValueError as error:
            raise UserError(
                f"resume_from: saved with other training.optimizer or freeze_names settings ({error})"
            ) from error
        self.stream.load_state_dict(state["stream"])
        torch.set_rng_state(state["rng"][self.world.rank % len(state["rng"])])

    def save(
        self, name: str, state: saved_state.State | None = None, progress: Mapping[str, float] | None = None
    ) -> None:
        """Write the checkpoint folder `name` inside the run. Every process has to call this."""
        checkpoint.save(self.out / name, self.model, self.tokenizer, self.settings, state, self.world, progress)
        if self.world.is_main:
            replaced.let_go(self.out)

    def autocast(self) -> AbstractContextManager[Any]:
        # The cache keeps a bf16 copy of each plain layer's weight. With sharding, that would be the whole model again.
        cached = not isinstance(self.placement, Sharded)
        return self.plan.autocast(self.world.device, cached)


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load moments and counters, but keep this run's settings. Raises ValueError if the groups differ."""
    settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)
