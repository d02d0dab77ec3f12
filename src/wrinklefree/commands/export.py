"""`wf export`: a trained run in the format of a target, read back with the target's own library and compared."""

import importlib
from pathlib import Path
from typing import Any

from wrinklefree.config.compose import read_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.core.text import did_you_mean
from wrinklefree.data.open import heldout_batches
from wrinklefree.export.card import card
from wrinklefree.export.formats.packed import PackedReport, export_packed
from wrinklefree.models.find import model_folder
from wrinklefree.models.load import load_model
from wrinklefree.tracking.terminal import print_table, short_size
from wrinklefree.training import checkpoint

# `hf` is our own packed folder; the others are modules of `export/` with a function `write`.
FORMATS = {
    "hf": "",
    "dense": "wrinklefree.export.formats.dense",
    "bitnet": "wrinklefree.export.formats.bitnet",
    "gguf": "wrinklefree.export.formats.gguf",
    "compressed-tensors": "wrinklefree.export.formats.compressed_tensors",
    "coreml": "wrinklefree.export.formats.coreml",
    "anemll": "wrinklefree.export.formats.anemll",
}
CERTIFY_TOKENS = 8192


# Settings of `write`, and the one format that each belongs to.
SETTINGS = {"gguf_type": "gguf", "factored_rank": "coreml", "head_bits": "hf"}


def run(run: Path, format: str, out: Path | None, force: bool, **settings: Any) -> None:
    """Export the trained model of a run or checkpoint folder. Raises UserError where it cannot be, or not be proved."""
    if format not in FORMATS:
        raise UserError(f"--format {format}: unknown{did_you_mean(format, FORMATS)}; available: {', '.join(FORMATS)}")
    given = {name: value for name, value in settings.items() if value is not None}
    for name in given:
        if SETTINGS[name] != format:
            flag = f"--{name}".replace("_", "-")
            raise UserError(f"{flag}: has no effect with --format {format}, it is for --format {SETTINGS[name]}")
    folder, target = model_folder(run), out or default_out(run, format)
    config = _config(folder)
    if target.exists() and not force:  # before the minutes that loading a large model takes
        raise UserError(f"{target}: exists already; choose another with --out or give --force to replace it")
    model, tokenizer = load_model(folder)
    length = min(config.training.max_seq_length, model.config.max_position_embeddings)
    batches = heldout_batches(config.data, tokenizer, batch_size=1, length=length, max_tokens=CERTIFY_TOKENS)
    if format == "hf":
        report = export_packed(
            model,
            tokenizer,
            config.method,
            target,
            card=card(config),
            force=force,
            batches=batches,
            head_bits=given.get("head_bits", config.export.head_bits),
            snap_scales=config.export.snap_scales,
        )
        table = rows(report)
    else:
        write = importlib.import_module(FORMATS[format]).write
        with written_aside(target) as aside:
            table = write(model, tokenizer, aside, batches, **given)
            (aside / "README.md").write_text(f"{card(config)}\n{described(format, table)}", encoding="utf-8")
    print_table(["", str(target)], table)
    print(f"\nwrote {target}/; next: {NEXT[format].format(target=target)}")


NEXT = {
    "hf": "wf generate {target} --prompt 'def '",
    "dense": "wf eval {target}",
    "bitnet": "AutoModelForCausalLM.from_pretrained('{target}')",
    "gguf": "llama-cli -m {target}/model.gguf -p 'def '",
    "compressed-tensors": "vllm serve {target}",
    "coreml": "on macOS 15, coremltools.models.MLModel('{target}/model.mlpackage', function_name='prefill')",
    "anemll": "ANEMLL's converter, with {target}/model_state_dict.pt",
}


def described(format: str, table: list[list[str]]) -> str:
    """The comparison as a section of the model card."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in table)
    return f"## Exported as {format}\n\n| read back and compared | value |\n|---|---|\n{lines}\n"


def default_out(run: Path, format: str) -> Path:
    """`RUN/packed`, `RUN/gguf` and so on, or a sibling where one checkpoint was named."""
    name = "packed" if format == "hf" else format
    return run / name if model_folder(run) != run else run.with_name(f"{run.name}-{name}")


def _config(folder: Path) -> Config:
    """The config that trained this checkpoint. Raises UserError where there is none, or it does not quantize."""
    file = folder / checkpoint.CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {checkpoint.CONFIG}, so not a checkpoint that `wf train` wrote")
    config = read_config(file)
    if config.method is None:
        raise UserError(
            f"{folder}: trained without quantization, so there is nothing to pack: {folder} is a plain model already"
        )
    return config


def rows(report: PackedReport) -> list[list[str]]:
    """The report as lines of a table."""
    proof = report.certificate
    cost = report.rounding
    rounding = [] if cost is None else [["KL of what packing rounded, nats", f"{cost.kl_mean:.1e}"]]
    return [
        ["weights file", short_size(report.file_bytes)],
        ["quantized layers", short_size(report.linear_bytes)],
        ["bits per quantized weight", f"{report.bits_per_quantized_weight:.3f}"],
        ["bits per weight, whole model", f"{report.bits_per_weight:.3f}"],
        ["layers with identical codes", f"{proof.layers} of {proof.layers}"],
        ["KL(trained, packed), nats", f"{proof.kl_mean:.1e}"],
        ["same most likely token", f"{proof.same_top1:.2%}"],
        *rounding,
    ]
