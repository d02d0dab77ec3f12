"""Our own rows: finished runs, read from their folders or made by the commands below, and measured as packed."""

import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.real.measure import Test, measure, of_model
from benchmarks.real.rows import Row
from wrinklefree.core.errors import UserError
from wrinklefree.models.load import load_model
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import packed_layers
from wrinklefree.runs.report import RESULTS, read_figures
from wrinklefree.tracking.run_log import CSV_NAME

COMMON = "data=local data.path={text} export.head_bits=8 seed={seed} output_dir={out}"
COMMANDS = {
    "w2": "fairy2 -m {model} --mode w2",
    "w1": "fairy2 -m {model} --mode w1",
    "ternary": "train model={model} training=ternary method.rotate_inputs=true",
    "q2a4": "train model={model} training=anemll_q2a4",
    "seq": "train model={model} training=seq_w2",
    "residual_signs": "train model={model} training=residual_signs_w2",
    "w2_paper": "fairy2 -m {model} --mode w2 method.preset=paper",
    # One part of the training taken away:
    "w2_plain_start": "fairy2 -m {model} --mode w2 training.start=plain",
    "w2_no_blocks": "fairy2 -m {model} --mode w2 training.start=calibrated training.blockwise.enabled=false",
    "w2_unrotated": "fairy2 -m {model} --mode w2 method.rotate_inputs=false",
}
CONTROLS = ("seq", "residual_signs", "w2_paper")  # ours, but in the table as peers


def train(name: str, model: Path, text: Path, out: Path, length: str, seed: int) -> None:
    """Make the run `name` with its command, unless it is finished. Raises UserError if the command fails."""
    if (out / RESULTS).exists():
        return
    words = command(name, model.resolve(), text.resolve(), out.resolve(), length, seed)
    wf = shutil.which("wf", path=Path(sys.executable).parent)
    if wf is None:
        raise UserError("no wf beside this Python: install the package first")
    if subprocess.run([wf, *words], stdout=sys.stderr).returncode:
        raise UserError(f"wf {shlex.join(words)}: failed; its message is above")


def command(name: str, model: Path, text: Path, out: Path, length: str, seed: int) -> list[str]:
    """The words after `wf` that make the run `name`, with those of `length`, such as `--budget 2h`, at their end."""
    values = {"model": model, "text": text, "out": out, "seed": seed}
    return [word.format(**values) for word in f"{COMMANDS[name]} {COMMON}".split()] + length.split()


def row(name: str, folder: Path, test: Test) -> Row:
    """Measure a finished run as packed. Raises UserError if it is not finished, or has no embedding at 8 bits."""
    results, packed = read_figures(folder / RESULTS), folder / "packed"
    model, _ = load_model(packed, dtype=torch.float32)
    head = model.get_output_embeddings()
    if not isinstance(head, PackedLinear) or not packed_layers(model):
        raise UserError(f"{packed}: the table has embeddings at 8 bits: train with export.head_bits=8")
    return Row.of(
        name,
        measure(of_model(model), test),
        bits=results["bits_per_quantized_weight"],
        bytes=sum(file.stat().st_size for file in packed.glob("*.safetensors")),
        minutes=max(results.get("minutes", 0.0), minutes(folder / CSV_NAME)),
        source=str(folder),
    )


def minutes(log: Path) -> float:
    """Minutes of training by its log. Resumed runs go on counting."""
    with log.open(newline="") as file:
        return max((float(line["elapsed_sec"]) for line in csv.DictReader(file)), default=0.0) / 60
