"""What comes before the training: a calibrated start, and blocks that are rebuilt one after the other.

The run's folder has `blocks/block_N.safetensors` for each block that is done. An interrupted run goes on from there.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import BlockwiseConfig, Config
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import file_aside
from wrinklefree.core.method import quant_layers
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.distributed.world import ALONE, barrier
from wrinklefree.reconstruction.rebuild import Rebuilding
from wrinklefree.runs import folder, setup
from wrinklefree.runs.setup import Run
from wrinklefree.tracking.terminal import spoken_time

log = logging.getLogger("wrinklefree")


def wanted(config: Config) -> bool:
    """Whether the run begins with a calibration or with blocks that are rebuilt."""
    return config.method is not None and (config.training.start == "calibrated" or config.training.blockwise.enabled)


def rebuild(run: Run, original: PreTrainedModel, student: PreTrainedModel) -> None:
    """Calibrate and rebuild `student`, in place. Raises UserError if its method cannot be calibrated."""
    made = run.out / folder.BLOCKS
    if run.is_main:
        made.mkdir(exist_ok=True)
        _rebuild(run, original, student, made)
    barrier(run.world)
    if not run.is_main:
        for number, block in enumerate(decoder_layers(student)):
            _take(block, made, number)


def _rebuild(run: Run, original: PreTrainedModel, student: PreTrainedModel, made: Path) -> None:
    """Rebuild the blocks that are not in the folder `made`, and write them there."""
    t, blocks = run.config.training, decoder_layers(student)
    settings = t.blockwise if t.blockwise.enabled else replace(t.blockwise, steps=0)
    calibrated = t.start == "calibrated"
    if calibrated:
        _check_calibrates(student)
    batches = rows(run, settings)
    log.info("rebuilding %d blocks on %s tokens", len(blocks), f"{sum(b['input_ids'].numel() for b in batches):,}")
    autocast = partial(run.plan.autocast, student.device)
    work = Rebuilding(original, student, batches, settings, autocast, run.config.seed, calibrated)
    for number, block in enumerate(blocks):
        if _take(block, made, number):
            work.pass_by(number)
            continue
        report = work.rebuild(number)
        with file_aside(_file(made, number)) as aside:
            save_file({name: tensor.contiguous() for name, tensor in block.state_dict().items()}, aside)
        errors = f"error {report.calibrated:.4f}" + (f" -> {report.trained:.4f}" if settings.steps else "")
        left = spoken_time(report.seconds * (len(blocks) - number - 1))
        log.info("block %d of %d: %s, %.0f s (%s to go)", number + 1, len(blocks), errors, report.seconds, left)


def _file(made: Path, number: int) -> Path:
    return made / f"block_{number}.safetensors"


def _take(block: nn.Module, made: Path, number: int) -> bool:
    """Load a block that was rebuilt before. False if there is none.

    Raises UserError if the file is broken, or of another model.
    """
    file = _file(made, number)
    if not file.exists():
        return False
    try:
        block.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{file}: broken, or of another model: remove it, and the block is rebuilt") from error
    return True


def _check_calibrates(student: PreTrainedModel) -> None:
    """Raises UserError if a quantized layer cannot be calibrated."""
    for fqn, layer in quant_layers(student).items():
        if not layer.calibrates:
            raise UserError(
                f"training.start=calibrated: {layer.config.name} cannot choose the codes of {fqn} by its inputs with "
                f"these settings (trained scales can): use training.start=plain"
            )


def rows(run: Run, settings: BlockwiseConfig) -> list[Batch]:
    """The first rows of the training text that hold `settings.tokens` tokens, cut to its length, as batches."""
    length = min(settings.max_seq_length, run.plan.length)
    count = max(1, settings.tokens // length)
    found: list[Tensor] = []
    for batch in setup.open_stream(run.config, run.tokenizer, ALONE):
        ids = batch["input_ids"]
        found += ids[:, : ids.shape[1] // length * length].reshape(-1, length)
        if len(found) >= count:
            break
    whole = torch.stack(found[:count])
    return [{"input_ids": part} for part in whole.split(settings.batch_size)]
