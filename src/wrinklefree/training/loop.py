"""`fit`: the one training loop. Stages differ in their config and their objective, never in their loop."""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import OptimizerConfig, TrainingConfig
from wrinklefree.core.errors import DataError, UserError
from wrinklefree.core.method import refresh
from wrinklefree.core.signals import handling
from wrinklefree.distributed import sharding
from wrinklefree.distributed.sharding import Whole
from wrinklefree.distributed.world import World, any_of, barrier
from wrinklefree.objectives.base import Metrics, Objective
from wrinklefree.tracking.run_log import Silent, Tracker
from wrinklefree.training import best, checkpoint, optim, pacing
from wrinklefree.training.budget import EVALUATION, SAVE, STEP, Budget, Pace
from wrinklefree.training.diagnose import explain_nonfinite
from wrinklefree.training.forecast import how_long
from wrinklefree.training.microbatches import Step, steps
from wrinklefree.training.plan import Plan
from wrinklefree.training.schedule import rates
from wrinklefree.training.state import Stream, TrainingState
from wrinklefree.training.uploads import Uploads

log = logging.getLogger("wrinklefree")

Evaluate = Callable[[nn.Module], dict[str, float]]
OnStep = Callable[[nn.Module, int], None]  # the model and the number of the step that comes, from 0


def do_nothing(model: nn.Module, step: int) -> None:
    """Default for `on_step`: most models have no schedule of their own."""


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
    on_resumed: Callable[[], None] | None = None,
    forecast: bool = False,
    budget: Budget | None = None,
) -> Path:
    """Train to the end of `plan` in the run folder `out`. Returns `out/final`, which is the best model if `keep_best`.

    `settings` is the resolved config as YAML, for checkpoints and W&B. `resume` is a checkpoint to continue, bit for
    bit; `on_resumed` is called on the main process once it is known to fit. `placement` says how model and teacher are
    sharded; None means that each process has both whole. With `forecast`, a long training begins with a line that says
    how long it takes. With `budget`, the training takes as many of the plan's steps as its minutes suffice for.

    Raises UserError
    - if the minutes do not suffice for one step,
    - after Ctrl-C, SIGTERM or SIGHUP, once the step is finished and saved,
    - if the data cannot be read on, once what was trained so far is saved,
    - if the loss is not finite; nothing is saved then, so that the newest checkpoint is a good one.
    """
    t = training
    placement, optimizers = placement or Whole(world), _optimizers(model, t.optimizer, plan)
    run = TrainingState(
        model, objective, stream, t, plan, world, placement, optimizers, out=out, tokenizer=tokenizer, settings=settings
    )
    if budget is not None:
        budget.last_step = plan.max_steps
        run.budget, run.pace = budget, Pace(budget.clock)
    if resume is not None:
        _resume(run, resume, on_resumed)
    if t.gradient_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    if budget is not None:
        on_step(model, run.step)  # what it sets for the first step, the steps that are timed need too
        pacing.begin(run, _step)
    elif forecast:
        how_long(run)
    tracker = Tracker(out, run.plan.max_steps, t.logging.wandb, settings, run.step) if world.is_main else Silent()
    with tracker, _uploading(run), _interruptible() as stopped:
        _run_steps(run, evaluate, on_step, tracker, stopped)
    if stream.skipped:
        log.warning("data.bad_rows=skip: %d rows were left out in all", stream.skipped)
    model.eval()
    return _finish(run)


def _resume(run: TrainingState, path: Path, on_resumed: Callable[[], None] | None) -> None:
    """Take over the weights and the state of a checkpoint."""
    checkpoint.load_weights(path, run.model)
    run.load_state(path)
    if on_resumed is not None and run.world.is_main:
        on_resumed()
    best.resume(run, path)
    end = run.plan.max_steps
    if run.step < end:
        log.info("step %d, %d steps to go", run.step, end - run.step)
    else:
        log.info("step %d: the training ends with step %d, so there is nothing left to train", run.step, end)


def _run_steps(
    run: TrainingState,
    evaluate: Evaluate,
    on_step: OnStep,
    tracker: Tracker | Silent,
    stopped: Callable[[], bool],
) -> None:
    """Step, evaluate, log and save until the last step, or until patience runs out. Raises UserError if stopped."""
    t, first = run.training, run.step
    batches, rate = steps(run), rates(t.scheduler)
    row: dict[str, float] = {}
    save, saved = False, run.pace.clock()
    while True:
        if run.budget is not None and run.step > first and pacing.look_again(run):
            tracker.set_total(run.plan.max_steps)
        max_steps = run.plan.max_steps
        # Evaluating and saving come before the step: the last pass does both, and no code follows the loop.
        last = run.step >= max_steps
        due = run.step > first and (last or run.step % t.eval_interval == 0)
        if due or (t.eval_first and run.step == 0):
            with run.pace.timed(EVALUATION):
                row |= _evaluate(run, evaluate)
        last = last or _had_enough(run)
        if row and (last or "eval_loss" in row or run.step == 1 or run.step % t.log_interval == 0):
            tracker.log(run.step, row)
        # A batch with several losses cannot be gone on with from its middle.
        between = run.step % run.objective.losses_per_batch == 0
        stop = any_of(stopped(), run.world) and between
        overdue = any_of(run.pace.clock() - saved >= 60 * t.save_minutes, run.world)
        save = save or overdue or (run.step > first and run.step % t.save_interval == 0)
        if run.step > first and (last or stop or (save and between)):
            with run.pace.timed(SAVE):
                _save(run)
            save, saved = False, run.pace.clock()
        if last:
            return
        if stop and not run.step:
            raise UserError("stopped before the first step, so nothing is saved; start over with --force")
        if stop:
            raise UserError(f"stopped at step {run.step}, saved; go on with training.resume_from=latest")
        run.objective.on_step(run.step, max_steps)
        on_step(run.model, run.step)
        with run.pace.timed(STEP):
            row = _step_or_save(run, batches, rate(run.plan.progress(run.step, run.planned)), first)
        run.planned += run.plan.tokens_per_step
        tracker.update(run.step, row["train_loss"], row["lr"], row["tokens_per_sec"])


def _step_or_save(run: TrainingState, batches: Iterator[Step], factor: float, first: int) -> dict[str, float]:
    """Take one step. If the data cannot be read on, save the steps since `first`, and raise UserError."""
    position = run.stream.state_dict()
    try:
        return _step(run, batches, factor)
    except DataError as error:
        if run.step == first:
            raise
        run.stream.load_state_dict(position)  # a resumed run reads this step's batches again
        _save(run)
        raise UserError(
            f"{error}; stopped at step {run.step}, saved; once it is mended, go on with training.resume_from=latest"
        ) from error


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


def _step(run: TrainingState, batches: Iterator[Step], factor: float) -> dict[str, float]:
    """Take one optimizer step at `factor` x the peak learning rates. Returns the step's row of the log."""
    t, started = run.training, time.perf_counter()
    optim.set_rate(run.optimizers, factor)
    if t.compile:
        refresh(run.model, run.plan.dtype)
    sums: Metrics = {}
    step = next(batches)
    for loss, values in step:
        loss.backward()
        _add(sums, values)
    means = step.means(sums)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    run.placement.finish_gradients(parameters, 1 / step.count)
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


def _add(sums: Metrics, values: Metrics) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value


def _evaluate(run: TrainingState, evaluate: Evaluate) -> dict[str, float]:
    """Return the held-out figures, and with `keep_best` save the model in `best/` if it is the best so far."""
    run.model.eval()
    with run.autocast():
        values = run.placement.with_whole_parameters(partial(evaluate, run.model))
    run.model.train()
    better = values["eval_loss"] < run.best_loss
    run.best_loss = min(run.best_loss, values["eval_loss"])
    run.stale = 0 if better else run.stale + 1
    if better and run.training.keep_best:
        best.keep(run, values["eval_loss"])
    return values


def _had_enough(run: TrainingState) -> bool:
    patience = run.training.patience
    if not patience or run.stale < patience:
        return False
    log.info("stopped at step %d: no better model in %d evaluations", run.step, patience)
    return True


def _save(run: TrainingState) -> None:
    folder, name, limit = run.out / "checkpoints", f"step_{run.step}", run.training.save_total_limit
    run.save(f"checkpoints/{name}", run.state())
    best.checkpoint_saved(run)
    if run.uploads is not None:
        best.add_to(run, folder / name)
        run.uploads.add(name)
    if run.world.is_main:
        checkpoint.prune(folder, limit, spare=[] if run.uploads is None else run.uploads.waiting())
    barrier(run.world)


def _finish(run: TrainingState) -> Path:
    if run.training.keep_best and (run.out / best.BEST).is_dir():
        checkpoint.load_weights(run.out / best.BEST, run.model)
    run.save("final")
    return run.out / "final"


@contextmanager
def _uploading(run: TrainingState) -> Iterator[None]:
    """Upload checkpoints while the block runs, if `training.upload_to` names a place; only the main process does."""
    if run.training.upload_to is None or not run.world.is_main:
        yield
        return
    keep = run.training.save_total_limit
    run.uploads = Uploads(run.out / "checkpoints", run.training.upload_to, keep=keep)
    try:
        yield
    finally:
        run.uploads.close()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether Ctrl-C was pressed, or SIGTERM or SIGHUP sent. A second one stops at once."""
    asked: list[int] = []

    def ask(number: int) -> None:
        asked.append(number)
        log.warning("%s: stopping after this step (once more stops at once, without saving)", signal.strsignal(number))

    with handling(ask, once=True):
        yield lambda: bool(asked)
