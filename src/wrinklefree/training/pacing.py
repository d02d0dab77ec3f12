"""Chooses how many steps fit into the minutes of a stage: before the first one, and again if that turns out wrong.

Machines are shared, so the time that a step takes changes. After each tenth of the training the end is forecast from
what was measured since the last look; if it is more than `TOLERANCE` off, the remaining steps are chosen anew. The
schedule goes on from where it is, and still ends at zero.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import any_of, gather
from wrinklefree.tracking.terminal import spoken_time
from wrinklefree.training import optim
from wrinklefree.training.budget import EVALUATION, SAVE, STEP, Budget, Intervals, fitting, rest
from wrinklefree.training.microbatches import Step, steps
from wrinklefree.training.plan import Plan
from wrinklefree.training.state import TrainingState

log = logging.getLogger("wrinklefree")

TakeStep = Callable[[TrainingState, Iterator[Step], float], Any]  # at a factor on the learning rates

MARKS = 10  # looks in a training

TOLERANCE = 0.05  # of the training's seconds

TIMED = 2  # steps, after one that warms up

LEAST_STEPS = 20  # of a training that an error message recommends

# Before the first evaluation and the first save have been measured: an evaluation has one forward pass, a step has two
# (the teacher's too) and a backward pass; a checkpoint is 12 bytes a parameter.
EVALUATION_SHARE = 1 / 3
SAVE_SECONDS = 12 / 300e6


def begin(run: TrainingState, take_step: TakeStep) -> None:
    """Choose the steps, or go on with a checkpoint's plan. Every process has to call this.

    Raises UserError if not one step fits into the minutes. If blocks were rebuilt in them, a warning says so, and the
    training has no step.
    """
    budget = _budget(run)
    budget.begin()
    budget.seconds = gather(budget.seconds, run.world)[0]
    if budget.kept:
        budget.mark = _mark(run)
        log.info("budget: %s of training are done, and the plan goes on", spoken_time(budget.before))
        return
    if run.step >= budget.last_step:
        return
    if not run.pace.means:
        _measure(run, take_step)
    last, means = max(run.step, _last_step(run)), run.pace.means
    if last == run.step and not budget.rebuilt:
        raise UserError(_too_little(run))
    _take(run, replace(run.plan, max_steps=last, bend=(0, 0.0)))  # as if it had been planned so from the beginning
    if last == run.step:
        log.warning("%s. The model stays as it was rebuilt", _too_little(run))
        return
    budget.mark = _mark(run)
    told = (
        spoken_time(60 * budget.minutes),
        spoken_time(60 * budget.minutes - budget.seconds - budget.reserved),
        spoken_time(budget.reserved),
        last - run.step,
        means[STEP],
    )
    log.info("budget of %s: %s are spent, %s are kept for the end; %d steps of %.3g s", *told)
    if last == budget.last_step:
        early = budget.seconds - budget.trained() - rest(run.step, last, means, _every(run))
        log.info("all steps fit into the budget, so the training ends about %s early", spoken_time(max(0.0, early)))


def look_again(run: TrainingState) -> bool:
    """Choose the remaining steps anew if the training would end at another time. Returns whether the plan changed.

    Every process has to call this after each step.
    """
    budget = _budget(run)
    mark = _mark(run)
    if run.step >= run.plan.max_steps or not any_of(mark > budget.mark, run.world):
        return False
    budget.mark = mark
    run.pace.settle()
    run.pace.means = gather(run.pace.means, run.world)[0]
    left = gather(budget.seconds - budget.trained(), run.world)[0]
    off = left - rest(run.step, run.plan.max_steps, run.pace.means, _every(run))
    if abs(off) <= TOLERANCE * budget.seconds:
        return False
    before, last = run.plan.max_steps, max(run.step + 1, _last_step(run))
    if last == before:
        return False
    _take(run, run.plan.ending(run.step, last))
    told = (run.step, "early" if off > 0 else "late", run.pace.means[STEP], last, before)
    log.info("step %d: the training would end %s at %.3g s a step: it ends with step %d now, not %d", *told)
    return True


def _budget(run: TrainingState) -> Budget:
    assert run.budget is not None
    return run.budget


def _every(run: TrainingState) -> Intervals:
    return Intervals(run.training.eval_interval, run.training.save_interval)


def _mark(run: TrainingState) -> int:
    """How many tenths of the steps or of the time are gone; a training that is slow sees it by the time."""
    budget = _budget(run)
    return int(MARKS * max(run.step / run.plan.max_steps, budget.trained() / budget.seconds))


def _last_step(run: TrainingState) -> int:
    """The last step that fits, for all processes the same."""
    budget = _budget(run)
    left = gather(budget.seconds - budget.trained(), run.world)[0]
    return min(budget.last_step, fitting(run.step, left, run.pace.means, _every(run)))


def _take(run: TrainingState, plan: Plan) -> None:
    run.plan = plan
    _budget(run).on_plan(plan)


def _measure(run: TrainingState, take_step: TakeStep) -> None:
    """Time real steps at a learning rate of 0. The weights, the data and the random numbers are as before."""
    device, position, per_batch = run.world.device, run.stream.state_dict(), run.objective.losses_per_batch
    kept = [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers]
    counters = run.step, run.tokens
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        real_steps = steps(run)
        for _ in range(per_batch):
            take_step(run, real_steps, 0.0)
        began = run.pace.clock()
        for _ in range(TIMED * per_batch):
            take_step(run, real_steps, 0.0)
        seconds = (run.pace.clock() - began) / (TIMED * per_batch)
    run.step, run.tokens = counters
    run.stream.load_state_dict(position)
    for optimizer, saved in zip(run.optimizers, kept, strict=True):
        optimizer.load_state_dict(saved)
    optim.set_rate(run.optimizers, 1.0)
    seconds = gather(seconds, run.world)[0]
    tokens = run.plan.tokens_per_step
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    run.pace.means = {
        STEP: seconds,
        EVALUATION: seconds * EVALUATION_SHARE * run.training.eval_tokens / tokens,
        SAVE: parameters * SAVE_SECONDS,
    }


def _too_little(run: TrainingState) -> str:
    """What to do if not one step fits."""
    budget, means = _budget(run), run.pace.means
    other = budget.before + budget.spent() + budget.reserved
    least = other + rest(run.step, run.step + LEAST_STEPS, means, _every(run))
    return (
        f"training.max_minutes={budget.minutes:.3g}: too little for one step, which takes {means[STEP]:.3g} s: "
        f"loading, evaluating and packing take {spoken_time(other)}; give at least {math.ceil(least / 60)} minutes "
        f"(--budget or training.max_minutes)"
    )
