"""Rebuild a quantized model block by block: each block's output is made equal to the original's on a little text.

    minimize  sum_t |B~(x~_t) - B(x_t)|^2 / |B(x_t)|^2

B is a decoder block of the original, and x_t its input at token t. B~ is the quantized block, and x~_t its input, which
comes from the quantized blocks before it. So a block also makes up for the errors that it is given.

A token's error is divided by that token's own square norm. Some tokens (the first of a text, line ends) have
activations a hundred times as large as all others; in a plain sum of squares nothing else would be learned.

Each block is first calibrated (feedback.py), then trained by AdamW with a learning rate that falls to 0. Only one block
is trained at a time, so memory holds its gradients and moments alone. Two hidden states per token are in files.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from wrinklefree.config.schema import BlockwiseConfig, SchedulerConfig
from wrinklefree.core import stored
from wrinklefree.core.batch import Batch
from wrinklefree.core.files import full_disk_said
from wrinklefree.core.method import keep_effective, masters, quant_layers
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.distributed.world import wait_for
from wrinklefree.reconstruction import blocks, feedback
from wrinklefree.reconstruction.moments import Moments
from wrinklefree.training import optim, schedule

log = logging.getLogger("wrinklefree")

SCHEDULE = SchedulerConfig(name="linear", warmup_ratio=0.05)  # over a block's steps


@dataclass
class Report:
    """What came of one block: the mean relative squared error of a held-out token before and after its training.

    A token counts at most 1. In the block where large activations begin, the student gives them to a few tokens which
    have none in the original. Relative to their targets these errors are near 1,000, and would hide all others.

    A training that did not help is taken back.
    """

    number: int
    calibrated: float
    trained: float
    seconds: float
    steps: int
    training: float  # of the seconds


@dataclass
class Rebuilding:
    """A model that is rebuilt. `hidden` and `target` are the inputs of the next block, one tensor per batch."""

    original: PreTrainedModel
    student: PreTrainedModel
    batches: list[Batch]
    heldout: int  # of the batches, the last ones: nothing learns from them, and errors are measured on them
    settings: BlockwiseConfig
    autocast: Callable[[], AbstractContextManager[Any]]
    seed: int
    calibrate: bool = True
    folder: Path | None = None  # for two files with hidden states; None means where the system keeps such files

    def __post_init__(self) -> None:
        self.hidden = self._first(self.student)
        self.target = self._first(self.original)

    def _learned(self) -> range:
        """The batches to learn from."""
        return range(len(self.batches) - self.heldout)

    def _first(self, model: PreTrainedModel) -> list[Tensor]:
        """The inputs of the first block, in a file."""
        return in_file((blocks.first_inputs(model, self._here(model, batch)) for batch in self.batches), self.folder)

    def _go_on(self, model: PreTrainedModel, states: list[Tensor], number: int) -> None:
        """Put what block `number` of `model` makes of the hidden states in their place."""
        for state, output in zip(states, self.outputs(model, states, number), strict=True):
            state.copy_(output)

    def _here(self, model: PreTrainedModel, batch: Batch) -> Batch:
        return {name: tensor.to(model.device) for name, tensor in batch.items()}

    def pass_by(self, number: int) -> None:
        """Go on to the inputs of the next block, because block `number` is rebuilt already."""
        self._go_on(self.original, self.target, number)
        self._go_on(self.student, self.hidden, number)

    def rebuild(self, number: int, steps: int) -> Report:
        """Calibrate block `number`, train it for `steps` steps, and go on to the inputs of the next."""
        started = time.perf_counter()
        self._go_on(self.original, self.target, number)
        weights = [token_weights(target) for target in self.target]
        block = self._owned(number)
        if self.calibrate:
            self._calibrate(number, block, weights)
        before = self.error(number, weights)
        after, training = before, 0.0
        if steps:
            kept = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
            began = time.perf_counter()
            self._train(number, block, weights, steps)
            training = time.perf_counter() - began
            after = self.error(number, weights)
            if not after < before:  # also if it is NaN
                block.load_state_dict(kept)
                after = before
        self._go_on(self.student, self.hidden, number)
        return Report(number, before, after, time.perf_counter() - started, steps, training)

    def _owned(self, number: int) -> nn.Module:
        """Block `number` of the student with its parameters in memory, to be changed."""
        block = decoder_layers(self.student)[number]
        if stored.is_stored(block):
            stored.own(block)
            for layer in quant_layers(block).values():
                layer.turn()
                if layer.config.rotate_inputs and not self.calibrate:  # the scales were those of the weight in the file
                    layer.fit(torch.ones(layer.in_features, device=layer.weight.device))
            keep_effective(block, True)
        return block

    def seconds_of_a_step(self) -> float:
        """How long a step of the first block takes, with its share of the passes that come before and after.

        The block is as it was afterwards. Of three tries the last counts.
        """
        block, weights = self._owned(0), [torch.ones(hidden.shape[:2]) for hidden in self.hidden]
        kept = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
        optimizers = self._optimizers(block)
        step = last_of_three(self.student.device, lambda: self._step(0, 0, weights, optimizers))
        block.zero_grad(set_to_none=True)
        block.load_state_dict(kept)
        # Original and student go on to the next block's inputs, and the calibration looks at those of this one.
        passes = 2 * last_of_three(self.student.device, lambda: list(self.outputs(self.student, self.hidden[:1], 0)))
        if self.calibrate:
            passes += last_of_three(self.student.device, lambda: self._moments(0, block, weights, [0]))
        return step + passes / self.settings.passes

    def seconds_of_calibration(self) -> float:
        """How long the codes of the first block take to choose. It is as it was afterwards."""
        block = self._owned(0)
        kept = {name: tensor.detach().clone() for name, tensor in block.state_dict().items()}
        began = time.perf_counter()
        self._calibrate(0, block, [torch.ones(hidden.shape[:2]) for hidden in self.hidden])
        wait_for(self.student.device)
        seconds = time.perf_counter() - began
        block.load_state_dict(kept)
        return seconds

    @torch.no_grad()
    def outputs(self, model: PreTrainedModel, inputs: list[Tensor], number: int) -> Iterator[Tensor]:
        """What block `number` of `model` makes of its inputs [B, L, hidden], batch by batch: fp32."""
        for i, hidden in enumerate(inputs):
            yield self.output(model, hidden, number, i).float().cpu()

    def output(self, model: PreTrainedModel, hidden: Tensor, number: int, i: int) -> Tensor:
        """The output of block `number` for the hidden states of batch `i`."""
        arguments = blocks.arguments(model, self._here(model, self.batches[i]), number)
        with self.autocast():
            return blocks.call(decoder_layers(model)[number], hidden.to(model.device), arguments)

    def _calibrate(self, number: int, block: nn.Module, weights: list[Tensor]) -> None:
        """Calibrate the block's layers, for what each is given while none of them is quantized."""
        found = self._moments(number, block, weights, self._learned())
        for name, layer in quant_layers(block).items():
            if name in found:
                feedback.calibrate(layer, found.pop(name).to(layer.weight.device))
            else:  # the model multiplies with its weight by itself
                layer.fit(torch.ones(layer.in_features, device=layer.weight.device))

    @torch.no_grad()
    def _moments(
        self, number: int, block: nn.Module, weights: list[Tensor], batches: Iterable[int]
    ) -> dict[str, Tensor]:
        """The second moments of what the block's layers are given in some batches, by name: fp32 [in, in]."""
        layers = quant_layers(block)
        with masters(layers.values()), Moments(layers) as moments:
            for i in batches:
                moments.weigh(weights[i].to(self.student.device))
                self.output(self.student, self.hidden[i], number, i)
            return moments.means()

    @torch.no_grad()
    def error(self, number: int, weights: list[Tensor]) -> float:
        """The mean over held-out tokens of the relative squared error of block `number`, at most 1 each."""
        total, tokens = 0.0, 0
        for i in range(len(self.batches))[-self.heldout :]:
            output = self.output(self.student, self.hidden[i], number, i).float().cpu()
            total += token_errors(output, self.target[i], weights[i]).clamp(max=1).double().sum().item()
            tokens += weights[i].numel()
        return total / tokens

    def _train(self, number: int, block: nn.Module, weights: list[Tensor], steps: int) -> None:
        """Train the block for `steps` steps of one batch each, in shuffled order."""
        optimizers = self._optimizers(block)
        if not optimizers:
            return
        rate = schedule.rates(SCHEDULE)
        generator = torch.Generator().manual_seed(self.seed * 1000 + number)
        num = len(self._learned())
        passes = -(-steps // num)
        order = torch.cat([torch.randperm(num, generator=generator) for _ in range(passes)])[:steps]
        for step, i in enumerate(order.tolist()):
            optim.set_rate(optimizers, rate((step + 0.5) / steps))
            self._step(number, i, weights, optimizers)

    def _optimizers(self, block: nn.Module) -> list[Optimizer]:
        """What trains the block's parameters: nothing if none of them is trained."""
        trained = groups(block, self.settings)
        return [torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.0)] if trained else []

    def _step(self, number: int, i: int, weights: list[Tensor], optimizers: list[Optimizer]) -> None:
        """One step of training block `number` on batch `i`."""
        output = self.output(self.student, self.hidden[i], number, i)
        if not output.requires_grad:
            return
        target, weight = self.target[i].to(output.device), weights[i].to(output.device)
        token_errors(output, target, weight).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def last_of_three(device: torch.device, action: Callable[[], object]) -> float:
    """The seconds that the third call of `action` takes: the first ones prepare what later ones find."""
    for _ in range(3):
        began = time.perf_counter()
        action()
        wait_for(device)
    return time.perf_counter() - began


def in_file(tensors: Iterable[Tensor], folder: Path | None) -> list[Tensor]:
    """Move tensors into one file in `folder`, as fp32. It has no name, so it is gone once nothing refers to them.

    Raises UserError if the disk is full.
    """
    shapes = []
    with full_disk_said(folder or Path(tempfile.gettempdir())), tempfile.NamedTemporaryFile(dir=folder) as file:
        for tensor in tensors:
            file.write(tensor.float().cpu().contiguous().numpy().data)
            shapes.append(tensor.shape)
        file.flush()
        whole = torch.from_file(file.name, shared=True, size=sum(map(math.prod, shapes)), dtype=torch.float32)
    parts = whole.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def groups(block: nn.Module, settings: BlockwiseConfig) -> list[dict[str, Any]]:
    """The trained parameters of a block for an optimizer, each with its own learning rate.

    Rates are relative to the size of what they train, since models differ in the size of their weights.
    """
    scales = optim.scale_parameters(block)
    found = []
    for name, parameter in block.named_parameters():
        if parameter.requires_grad:
            peak = settings.scale_lr if parameter in scales or parameter.ndim < 2 else settings.lr
            rate = peak * feedback.relative_size(name.rpartition(".")[2], parameter)
            found.append({"params": [parameter], "lr": rate, "peak_lr": rate})
    return found


def token_weights(target: Tensor) -> Tensor:
    """1 / |target_t|^2 for hidden states [B, L, hidden]: [B, L]."""
    return 1 / target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)


def token_errors(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """w_t |output_t - target_t|^2 for hidden states [B, L, hidden] and weights w [B, L]: [B, L]."""
    return (output.float() - target).square().sum(-1) * weights
