"""Compare the time of a training step, quantized and dense, side by side: what does quantization add?

    python -m benchmarks.step_time --model FOLDER [--json] [--methods w2,w1,ternary,subln,q2a4] [--micro-batches 2]

Both models see the same batches, with the same optimizer and no teacher. They take steps in turns, and each figure is
the least of several rounds. `step_time_ratio_135m` is the worst ratio. On a busy machine `--processor-time --threads 1`
counts the processor's time instead of the clock's.

`shares` are seconds of one quantized step:

    quantizer    codes of all layers and the weights that they stand for
    way back     from the weights' gradients to masters and scales, for all micro-batches
    vocabulary   head and loss, forward and backward
    optimizer    clipping and AdamW
    body         everything else: products, attention, norms, and what layers do to their inputs

`teacher` is a forward pass of the dense model over the same tokens, which neither step contains.

Quantizers start without their fits: time does not depend on values.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from wrinklefree.config.schema import DistillationConfig
from wrinklefree.core import library
from wrinklefree.core.method import find, quant_layers, refresh
from wrinklefree.models.load import load_model
from wrinklefree.objectives.language_model import BodyAndHead, vocabulary_losses
from wrinklefree.objectives.losses import token_losses
from wrinklefree.training import optim
from wrinklefree.training.plan import choose_dtype

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "w2": ("fairy2", {"num_stages": 2}),
    "w1": ("fairy2", {"num_stages": 1}),
    "ternary": ("bitdistill", {"scale_mode": "learned", "granularity": "row", "norm_mode": "none"}),
    "subln": ("bitdistill", {"subln_init": "ones"}),  # BitDistill's own settings, with two norms more a block
    "q2a4": ("anemll", {}),
}
CPU = torch.device("cpu")
ALONE = DistillationConfig(name="none")


class Stepper:
    """A model with its optimizer, which takes steps over the same micro-batches."""

    def __init__(self, model: PreTrainedModel, batches: list[dict[str, Tensor]], dtype: torch.dtype) -> None:
        self.model, self.batches, self.dtype = model.train(), batches, dtype
        self.parts = BodyAndHead(model)
        rates = {"lr": 1e-5, "muon_lr": 1e-5, "scale_lr": 1e-5}
        self.optimizers = optim.build(model, name="adamw", betas=(0.9, 0.95), weight_decay=0.0, **rates)
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def step(self) -> None:
        for batch in self.batches:
            with self.autocast():
                loss = vocabulary_losses(self.parts, None, batch, ALONE).loss
            loss.backward()
        self.update()

    def update(self) -> None:
        """What follows the last backward pass."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def quantize(self) -> None:
        for layer in quant_layers(self.model).values():
            layer.effective.clear()
        refresh(self.model, self.dtype)

    def hand_back(self) -> None:
        """Give every quantized weight a gradient, once for each micro-batch."""
        for _ in self.batches:
            for layer in quant_layers(self.model).values():
                weight = layer.effective_weight(self.dtype)
                weight.backward(torch.ones_like(weight))

    def vocabulary(self) -> None:
        for batch in self.batches:
            states = torch.ones(batch["labels"].numel(), self.model.config.hidden_size).requires_grad_()
            with self.autocast():
                states_in, head = self.parts.project(states)
                loss = token_losses(states_in, head, batch["labels"].flatten()).loss
            loss.backward()

    def teach(self) -> None:
        """Run the body as a teacher does."""
        for batch in self.batches:
            with torch.no_grad(), self.autocast():
                self.parts.states(batch)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of dense and quantized steps, their ratios and shares, for each method."""
    clock = time.process_time if args.processor_time else time.perf_counter
    dtype = choose_dtype(args.precision, CPU)
    rows = {name: compare(args, name, dtype, clock) for name in args.methods.split(",")}
    return {
        "step_time_ratio_135m": max(row["ratio"] for row in rows.values()),
        "methods": rows,
        "tokens_per_step": args.micro_batches * args.batch * args.length,
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "library": library.available() or library.isa(),
    }


def compare(args: argparse.Namespace, name: str, dtype: torch.dtype, clock: Callable[[], float]) -> dict[str, Any]:
    """Measure one method beside the dense model."""
    method, settings = METHODS[name]
    dense, quantized = (load_model(args.model, dtype=torch.float32)[0] for _ in range(2))
    quantized = find(method)(**settings).prepare(quantized, initialize=False)
    torch.manual_seed(0)
    ids = torch.randint(dense.config.vocab_size, (args.micro_batches, args.batch, args.length))
    positions = torch.arange(args.length).expand(args.batch, -1)
    batches = [{"input_ids": x, "labels": x, "position_ids": positions} for x in ids]
    plain, ours = Stepper(dense, batches, dtype), Stepper(quantized, batches, dtype)
    parts = {
        "quantizer": ours.quantize,
        "way back": ours.hand_back,
        "vocabulary": ours.vocabulary,
        "optimizer": ours.update,
        "teacher": plain.teach,
    }
    steps = least({"dense": plain.step, "quantized": ours.step}, args.rounds, clock)
    shares = least(parts, args.rounds, clock)
    teacher = shares.pop("teacher")
    shares["body"] = steps["quantized"] - sum(shares.values())
    return {"ratio": steps["quantized"] / steps["dense"], **steps, "shares": shares, "teacher": teacher}


def least(functions: dict[str, Callable[[], None]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """The least seconds of each function, which are called in turns. The first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function()
            seconds[name].append(clock() - start)
    return {name: min(each[1:]) for name, each in seconds.items()}


def show(figures: dict[str, Any]) -> None:
    """Print a table with one line for each method."""
    print("{precision}, {threads} threads, {capability}, {library}, {tokens_per_step} tokens a step".format(**figures))
    for name, row in figures["methods"].items():
        shares = ", ".join(f"{part} {seconds:.2f}" for part, seconds in row["shares"].items())
        print(f"{name:8} {row['ratio']:.3f}x = {row['quantized']:.2f} s / {row['dense']:.2f} s   ({shares})")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder with a model")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp32"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    figures = measure(args)
    print(json.dumps(figures, indent=2)) if args.json else show(figures)


if __name__ == "__main__":
    main()
