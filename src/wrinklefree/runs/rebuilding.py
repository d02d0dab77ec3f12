"""What comes before the training: a calibrated start, and blocks that are rebuilt one after the other.

The run's folder has `blocks/block_N.safetensors` for each block that is done. An interrupted run goes on from there.
"""

import json
import logging
import math
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.check import flatten
from wrinklefree.config.schema import Config
from wrinklefree.core import stored
from wrinklefree.core.batch import Batch, model_inputs
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside, write_json
from wrinklefree.core.method import QuantLinear, keep_effective, quant_layers
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.distributed.world import ALONE, barrier
from wrinklefree.reconstruction.pace import LEAST_STEPS, BlockPace
from wrinklefree.reconstruction.rebuild import Rebuilding, Report
from wrinklefree.runs import folder, setup
from wrinklefree.runs.setup import Run
from wrinklefree.tracking.terminal import spoken_time

log = logging.getLogger("wrinklefree")

STEPS = 96  # for each block, if nothing is known
BUDGET_SHARE, ALONE_SHARE = 0.25, 0.75  # of the minutes: before a training, and without one
MOST_STEPS = 384  # that a budget buys
LEAST_TOKENS = 4096  # with fewer, the second moments of wide layers are mostly noise
HELDOUT_TOKENS = 4096  # on which the error of a block is measured

# What makes the blocks what they are. Minutes may be others: the steps that they chose are kept.
SETTINGS = (
    *("seed", "model.pretrained", "method", "data"),
    *("training.start", "training.blockwise", "training.max_seq_length", "training.batch_size"),
    *("training.precision", "training.freeze_names"),
)
OTHERS = ("data.bad_rows", "data.allow_changes", "data.max_passes", "data.self_minutes")  # do not change the rows


def choose_steps(run: Run, original: PreTrainedModel, student: PreTrainedModel) -> int:
    """The steps for each block.

    If `training.blockwise.steps` is auto, that is as many as fit into a share of the minutes. Without minutes it is
    `STEPS`, or the number of the training's steps if that was set and is smaller.

    Raises UserError if the minutes do not suffice for a few steps.
    """
    t = run.config.training
    if not t.blockwise.enabled:
        return 0
    if not isinstance(t.blockwise.steps, str):
        return t.blockwise.steps
    if run.budget is None:
        return min(STEPS, t.max_steps) if t.max_steps else STEPS
    number, budget = len(decoder_layers(student)), run.budget
    probe = _work(run, original, student, rows(run, 0)[:2], choose_start(run.config, student))
    calibration = probe.seconds_of_calibration() if probe.calibrate else 0.0
    step = probe.seconds_of_a_step()
    least = number * (calibration + LEAST_STEPS * step)
    if least > 60 * budget.minutes - budget.spent():
        raise UserError(
            f"training.max_minutes={budget.minutes:.3g}: too little: rebuilding {number} blocks takes at least "
            f"{spoken_time(least)}; give at least {math.ceil((budget.spent() + least) / 60 / BUDGET_SHARE)} minutes "
            f"(--budget, training.max_minutes), or leave it out: training.start=plain training.blockwise.enabled=false"
        )
    return max(LEAST_STEPS, min(MOST_STEPS, int((_seconds(run) / number - calibration) / step)))


def _seconds(run: Run) -> float:
    """The seconds for all blocks, if their steps are chosen by the minutes: most of these if nothing comes after."""
    if run.budget is None or not isinstance(run.config.training.blockwise.steps, str):
        return math.inf
    share = ALONE_SHARE if run.config.training.max_steps == 0 else BUDGET_SHARE
    return share * 60 * run.budget.minutes


def fits_scales(config: Config) -> bool:
    """Whether the calibration fits all scales, so that nobody has to do it before."""
    calibrated = config.rebuilds and config.training.start != "plain"
    return calibrated and config.method.layer.nearest is not QuantLinear.nearest


def choose_start(config: Config, student: PreTrainedModel) -> bool:
    """Whether the codes are calibrated. Raises UserError if they have to be, and the method cannot."""
    plain = [fqn for fqn, layer in quant_layers(student).items() if not layer.calibrates]
    if config.training.start == "calibrated" and plain:
        raise UserError(
            f"training.start=calibrated: {config.method.name} cannot choose the codes of {plain[0]} by its inputs with "
            f"these settings (trained scales can): use training.start=plain"
        )
    if config.training.start == "auto" and plain:
        log.info("a plain start: with these settings, %s cannot choose codes by what layers are given", plain[0])
    return config.training.start != "plain" and not plain


def rebuild(run: Run, original: PreTrainedModel, student: PreTrainedModel) -> bool:
    """Calibrate and rebuild `student`, in place. Every process has to call this; the main one works.

    A run that goes on from a checkpoint takes the blocks as they were. Returns False if they are not there any more.

    Raises UserError if
    - the model has to be calibrated, and cannot be,
    - the blocks that are there are broken, or were made with other settings.
    """
    made = run.out / folder.BLOCKS
    if run.is_main and run.resume is None:
        _rebuild(run, original, student, made)
    barrier(run.world)
    return all(_take(block, made, number) for number, block in enumerate(decoder_layers(student)))


def _rebuild(run: Run, original: PreTrainedModel, student: PreTrainedModel, made: Path) -> None:
    """Rebuild the blocks that are not in the folder `made`, and write them there."""
    blocks, calibrate = decoder_layers(student), choose_start(run.config, student)
    steps = _plan(run, original, student, made / folder.PLAN)
    done = sum(_file(made, number).exists() for number in range(len(blocks)))
    if done == len(blocks):
        return
    batches = rows(run, steps)
    tokens = f"{sum(batch['input_ids'].numel() for batch in batches):,}"
    log.info("rebuilding %d blocks, %d steps each, with %s tokens of the text", len(blocks), steps, tokens)
    work = _work(run, original, student, batches, calibrate)
    pace = BlockPace(steps, _seconds(run) * (1 - done / len(blocks)), run.clock)
    try:
        _rebuild_each(blocks, work, made, pace)
    except KeyboardInterrupt:
        log.info("blocks that are done are kept; go on with training.resume_from=latest")
        raise


def _rebuild_each(blocks: nn.ModuleList, work: Rebuilding, made: Path, pace: BlockPace) -> None:
    report: Report | None = None
    for number, block in enumerate(blocks):
        if _take(block, made, number):
            work.pass_by(number)
            continue
        steps = pace.steps(len(blocks) - number, report)
        report = work.rebuild(number, steps)
        with file_aside(_file(made, number)) as aside:
            save_file({name: tensor.contiguous() for name, tensor in block.state_dict().items()}, aside)
        if stored.is_stored(block):
            _take(block, made, number)
        errors = f"error {report.calibrated:.4f}" + (f" -> {report.trained:.4f}" if steps else "")
        if steps < pace.planned:
            errors += f", {steps} of {pace.planned} steps, to end in time"
        left = spoken_time(report.seconds * (len(blocks) - number - 1))
        log.info("block %d of %d: %s, %.0f s (%s to go)", number + 1, len(blocks), errors, report.seconds, left)


def _work(
    run: Run,
    original: PreTrainedModel,
    student: PreTrainedModel,
    batches: list[Batch],
    calibrate: bool,
) -> Rebuilding:
    autocast, settings = partial(run.plan.autocast, student.device), run.config.training.blockwise
    heldout = min(len(batches) - 1, _batches(HELDOUT_TOKENS, run))
    seed, out = run.config.seed, run.out
    return Rebuilding(original, student, batches, heldout, settings, autocast, seed, calibrate, out)


def _plan(run: Run, original: PreTrainedModel, student: PreTrainedModel, file: Path) -> int:
    """The steps for each block. The first time they are chosen, and written beside the settings that make the blocks.

    Raises UserError if the file is broken, or has other settings.
    """
    settings = {key: value for key, value in flatten(asdict(run.config)) if _makes_blocks(key)}
    settings = json.loads(json.dumps(settings))  # as they are read back
    if not file.exists():
        steps = choose_steps(run, original, student)
        file.parent.mkdir(exist_ok=True)
        write_json(file, {"steps": steps, "settings": settings})
    plan = folder.blocks_plan(file)
    for key, now in settings.items():
        before = plan["settings"].get(key)
        if before != now:
            raise UserError(
                f"{file.parent}: its blocks were made with {key}={before}, but now it is {now}: go on with the same "
                f"settings, or start over with --force"
            )
    return int(plan["steps"])


def _makes_blocks(key: str) -> bool:
    return key.startswith(SETTINGS) and key not in OTHERS


def _file(made: Path, number: int) -> Path:
    return made / f"block_{number}.safetensors"


def _take(block: nn.Module, made: Path, number: int) -> bool:
    """Load a block that was rebuilt before. If it is stored, it stays in the file. False if there is none.

    Raises UserError if the file is broken, or of another model.
    """
    file = _file(made, number)
    if not file.exists():
        return False
    try:
        if stored.is_stored(block):
            stored.put_back(block, load_file(file))
            keep_effective(block, False)
        else:
            block.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{file}: broken, or of another model: remove it, and the block is rebuilt") from error
    return True


def _length(run: Run) -> int:
    return min(run.config.training.blockwise.max_seq_length, run.plan.length)


def _batches(tokens: int, run: Run) -> int:
    """How many batches have so many tokens."""
    return -(-tokens // (run.config.training.blockwise.batch_size * _length(run)))


def rows(run: Run, steps: int) -> list[Batch]:
    """The first rows of the training text, cut to the length for blocks, as batches.

    There are as many as `steps` steps go through `passes` times, or without steps as many as for `STEPS`, and a few to
    measure on.
    """
    settings, length = run.config.training.blockwise, _length(run)
    learned = max(_batches(LEAST_TOKENS, run), -(-(steps or STEPS) // settings.passes))
    count = (learned + _batches(HELDOUT_TOKENS, run)) * settings.batch_size
    found: dict[str, list[Tensor]] = defaultdict(list)
    for batch in setup.open_stream(run.config, run.tokenizer, ALONE):
        for name, tensor in model_inputs(batch).items():  # positions say where a document begins
            found[name] += tensor[:, : tensor.shape[1] // length * length].reshape(-1, length)
        if len(found["input_ids"]) >= count:
            break
    parts = {name: torch.stack(rows[:count]).split(settings.batch_size) for name, rows in found.items()}
    return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
