"""`wf export`: pack a trained run."""

from pathlib import Path

from wrinklefree import checkpoint, load
from wrinklefree import config as configs
from wrinklefree.config import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, did_you_mean
from wrinklefree.data import heldout_batches
from wrinklefree.export import hf
from wrinklefree.export.card import card
from wrinklefree.terminal import print_table, short_size

FORMATS = ["hf"]
CERTIFY_TOKENS = 8192


def run(run: Path, format: str, out: Path | None, force: bool) -> None:
    """Pack the trained model of a run or checkpoint folder. Raises UserError where it cannot be packed or proved."""
    if format not in FORMATS:
        raise UserError(f"--format {format}: unknown{did_you_mean(format, FORMATS)}; available: {', '.join(FORMATS)}")
    folder, target = load.model_folder(run), out or default_out(run)
    config = _config(folder)
    if target.exists() and not force:  # before the minutes that loading a large model takes
        raise UserError(f"{target}: exists already; choose another with --out or give --force to replace it")
    model, tokenizer = load.load(folder)
    length = min(config.training.max_seq_length, model.config.max_position_embeddings)
    batches = heldout_batches(config.data, tokenizer, batch_size=1, length=length, max_tokens=CERTIFY_TOKENS)
    report = hf.export(model, tokenizer, config.method, target, card=card(config), force=force, batches=batches)
    print_table(["", str(target)], rows(report))


def default_out(run: Path) -> Path:
    """`RUN/packed`, or a sibling where one checkpoint was named."""
    return run / "packed" if load.model_folder(run) != run else run.with_name(f"{run.name}-packed")


def _config(folder: Path) -> Config:
    """The config that trained this checkpoint. Raises UserError where there is none, or it does not quantize."""
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {checkpoint.CONFIG}, so not a checkpoint that `wf train` wrote")
    config = configs.from_yaml(file)
    if not isinstance(config.method, QuantMethod):
        raise UserError(f"{folder}: trained without quantization, so there is nothing to pack")
    return config


def rows(report: hf.PackedReport) -> list[list[str]]:
    """The report as lines of a table."""
    proof = report.certificate
    return [
        ["weights file", short_size(report.file_bytes)],
        ["quantized layers", short_size(report.linear_bytes)],
        ["bits per quantized weight", f"{report.bits_per_quantized_weight:.3f}"],
        ["bits per weight, whole model", f"{report.bits_per_weight:.3f}"],
        ["layers with identical codes", f"{proof.layers} of {proof.layers}"],
        ["KL(trained, packed), nats", f"{proof.kl_mean:.1e}"],
        ["same most likely token", f"{proof.same_top1:.2%}"],
    ]
