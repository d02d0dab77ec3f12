"""Tells how long a training will take. It measures two micro-batches before the first step."""

import logging
import time

import torch

from wrinklefree.distributed.world import wait_for
from wrinklefree.tracking.terminal import spoken_time
from wrinklefree.training.microbatches import Step, read
from wrinklefree.training.state import TrainingState

log = logging.getLogger("wrinklefree")

LONG = 100  # micro-batches; a shorter training is soon done, and needs no forecast


def how_long(run: TrainingState) -> None:
    """Log how long the rest of the training takes. Every process has to call this.

    Three micro-batches are computed, and the faster of the last two counts. Nothing is learned from them, and the data,
    the random numbers and the weights are as before.
    """
    accumulated = run.training.gradient_accumulation_steps
    left = run.plan.max_steps - run.step
    if left * accumulated < LONG or run.training.compile:  # compiling takes longer than many steps
        return
    device = run.world.device
    position = run.stream.state_dict()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        micro_batches = [Step(run, [batch]) for batch in read(iter(run.stream), 3, run.world)]
        seconds = [_measure(run, step) for step in micro_batches]
    run.stream.load_state_dict(position)
    shortest = min(seconds[1:]) * accumulated
    told = (spoken_time(left * shortest), shortest)
    log.info("about %s: %.3g s a step, and what the optimizer and evaluations take", *told)


def _measure(run: TrainingState, step: Step) -> float:
    """The seconds that the forward and backward passes of a step take."""
    started = time.perf_counter()
    step.advance()
    for weighed in step:
        weighed.loss.backward()
    wait_for(run.world.device)
    for parameter in run.model.parameters():
        parameter.grad = None
    return time.perf_counter() - started
