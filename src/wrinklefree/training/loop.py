"""`fit`: the one training loop. Stages differ in their config and their objective, never in their loop.

Evaluation and saving come before the step, so that the last pass does both and nothing needs a tail after the loop.

An objective's loss is a mean over the labelled tokens of its batch. A step adds up loss x tokens over its micro-batches
and processes and divides by all of their tokens once, so that however the same blocks are cut into micro-batches and
processes, every token counts alike and the step is the same.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import OptimizerConfig, TrainingConfig
from wrinklefree.core.batch import labelled
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import refresh
from wrinklefree.distributed import sharding
from wrinklefree.distributed.sharding import Whole
from wrinklefree.distributed.world import World, any_of, barrier, sum_over_processes
from wrinklefree.objectives.base import Metrics, Objective
from wrinklefree.tracking.run_log import Silent, Tracker
from wrinklefree.training import checkpoint, optim, storage
from wrinklefree.training.diagnose import explain_nonfinite
from wrinklefree.training.plan import Plan
from wrinklefree.training.schedule import rates
from wrinklefree.training.state import Stream, TrainingState

log = logging.getLogger("wrinklefree")


Evaluate = Callable[[nn.Module], dict[str, float]]
OnStep = Callable[[nn.Module, int], None]  # the model and the number of the step that comes, from 0


def do_nothing(model: nn.Module, step: int) -> None:
    """The `on_step` of a training without schedules inside its model."""


def fit(
    model: PreTrainedModel,
    objective: Objective,
    stream: Stream,
    training: TrainingConfig,
    plan: Plan,
    *,
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    settings: str,
    world: World,
    evaluate: Evaluate,
    placement: Whole | None = None,
    resume: Path | None = None,
    on_step: OnStep = do_nothing,
) -> Path:
    """Train to `plan.max_steps` in the run folder `out`; return `out/final`, with `keep_best` the best model.

    `settings` is the resolved config as YAML; checkpoints keep it, and W&B shows it. `placement` says where the model
    and its teacher have been placed; without it, each process has all of both. `resume` is a checkpoint to go on
    from, bit for bit.

    Ctrl-C finishes the step, saves and raises UserError. So does a loss that is not finite, but without saving: the
    newest checkpoint is then the last good one.
    """
    t = training
    placement, optimizers = placement or Whole(world), _optimizers(model, t.optimizer, plan)
    run = TrainingState(
        model, objective, stream, t, plan, world, placement, optimizers, out=out, tokenizer=tokenizer, settings=settings
    )
    if resume is not None:
        checkpoint.load_weights(resume, model)
        run.load_state(resume)
    if t.gradient_checkpointing:
        model.activation_checkpointing_enable()
    losses, rate = _losses(run), rates(t.scheduler, plan.max_steps)
    model.train()
    first = run.step
    row: dict[str, float] = {}
    tracker = Tracker(out, plan.max_steps, t.logging.wandb, settings, run.step) if world.is_main else Silent()
    with tracker, _interruptible() as stopped:
        while True:
            last = run.step == plan.max_steps
            due = run.step > first and (last or run.step % t.eval_interval == 0)
            if due or (t.eval_first and run.step == 0):
                row |= _evaluate(run, evaluate)
                last = last or _had_enough(run)
            if row and (last or "eval_loss" in row or run.step == 1 or run.step % t.log_interval == 0):
                tracker.log(run.step, row)
            stop = any_of(stopped(), world)
            if run.step > first and (last or stop or run.step % t.save_interval == 0):
                _save(run)
            if last:
                break
            if stop:
                raise UserError(f"stopped at step {run.step}, saved; go on with training.resume_from=latest")
            objective.on_step(run.step, plan.max_steps)
            on_step(model, run.step)
            row = _step(run, losses, rate(run.step))
            tracker.update(run.step, row["train_loss"], row["lr"], row["tokens_per_sec"])
    model.eval()
    return _finish(run)


def _optimizers(model: PreTrainedModel, o: OptimizerConfig, plan: Plan) -> list[Optimizer]:
    return optim.build(
        model,
        name=o.name,
        lr=plan.lr,
        betas=o.betas,
        weight_decay=o.weight_decay,
        muon_lr=o.muon_lr,
        scale_lr=o.scale_lr,
    )


def _losses(run: TrainingState) -> Iterator[tuple[Tensor, Metrics]]:
    """An endless stream of (loss, metrics), however many a batch yields."""
    for batch in run.stream:
        run.last_batch = {name: tensor.to(run.world.device) for name, tensor in batch.items()}
        results = run.objective(run.last_batch)
        while True:
            with run.autocast():  # not around the yield: backward runs outside of autocast
                result = run.placement.with_whole_parameters(partial(next, results, None))
            if result is None:
                break
            yield result


def _step(run: TrainingState, losses: Iterator[tuple[Tensor, Metrics]], factor: float) -> dict[str, float]:
    """One optimizer step at `factor` x the peak learning rates; returns its row of the log."""
    t, started = run.training, time.perf_counter()
    optim.set_rate(run.optimizers, factor)
    if t.compile:
        refresh(run.model, run.plan.dtype)
    sums: Metrics = {}
    for _ in range(t.gradient_accumulation_steps):
        loss, metrics = next(losses)
        count = labelled(run.last_batch).sum()  # what the loss is a mean over
        (loss * count).backward()
        _add(sums, {"loss": loss.detach(), **metrics}, count)
    means, total = _means(sums, run.world)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    run.placement.finish_gradients(parameters, 1 / total)
    norm = sharding.whole_scalar(nn.utils.clip_grad_norm_(parameters, t.gradient_clipping))
    if not (math.isfinite(means["loss"]) and math.isfinite(norm)):
        raise UserError(explain_nonfinite(run, means["loss"]))
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    tokens = run.world.size * t.gradient_accumulation_steps * run.last_batch["input_ids"].numel()
    run.step += 1
    run.tokens += tokens
    return {
        "train_loss": means.pop("loss"),
        "lr": run.plan.lr * factor,
        "grad_norm": norm,
        "tokens": run.tokens,
        "tokens_per_sec": tokens / (time.perf_counter() - started),
        **{f"train_{name}": value for name, value in means.items()},
    }


def _add(sums: Metrics, values: Metrics, count: Tensor) -> None:
    """Add values that are means over `count` tokens to sums over all of them."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.double() * count
    sums["count"] = sums.get("count", 0) + count


def _means(sums: Metrics, world: World) -> tuple[dict[str, float], float]:
    """Means over the tokens of all processes, and how many these are; 1 where there are none, and all means 0."""
    totals = sum_over_processes(sums, world)
    count = max(1.0, totals.pop("count"))
    return {name: value / count for name, value in totals.items()}, count


def _evaluate(run: TrainingState, evaluate: Evaluate) -> dict[str, float]:
    """Held-out figures; with `keep_best`, the best model so far is kept in `best/`."""
    run.model.eval()
    with run.autocast():
        values = run.placement.with_whole_parameters(partial(evaluate, run.model))
    run.model.train()
    better = values["eval_loss"] < run.best_loss
    run.best_loss = min(run.best_loss, values["eval_loss"])
    run.stale = 0 if better else run.stale + 1
    if better and run.training.keep_best:
        run.save("best")
    return values


def _had_enough(run: TrainingState) -> bool:
    patience = run.training.patience
    if not patience or run.stale < patience:
        return False
    log.info("no better one in %d evaluations: stopped at step %d", patience, run.step)
    return True


def _save(run: TrainingState) -> None:
    folder, name = run.out / "checkpoints", f"step_{run.step}"
    run.save(f"checkpoints/{name}", run.state())
    if run.world.is_main:
        checkpoint.prune(folder, run.training.save_total_limit)
        if run.training.upload_to is not None:
            storage.push(folder / name, f"{run.training.upload_to.rstrip('/')}/{name}")
    barrier(run.world)


def _finish(run: TrainingState) -> Path:
    best = run.out / "best"
    if run.training.keep_best and best.is_dir():
        checkpoint.load_weights(best, run.model)
    run.save("final")
    return run.out / "final"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C asks for a stop at the end of the step; the second stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        log.warning("stopping after this step (Ctrl-C again stops at once, without saving)")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)
