"""The rows of our own runs: made by the ordinary training, measured as packed."""

import time
from dataclasses import asdict
from pathlib import Path

import torch

from wrinklefree.compare.entries import Entry
from wrinklefree.compare.quality import Test
from wrinklefree.compare.rows import Row
from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.evaluate.speed import SPEED_TOKENS, decoding_speed, weight_bytes
from wrinklefree.generate.open import open_engine
from wrinklefree.models.load import load_model
from wrinklefree.runs.report import RESULTS, read_figures
from wrinklefree.tracking.run_log import CSV_NAME, read_rows


def source(entry: Entry) -> str:
    """A fingerprint of a finished run. Raises UserError if it is not finished."""
    return fingerprint(read_figures(entry.folder / RESULTS))


def trained(entry: Entry, test: Test) -> Row:
    """The row of a finished run. Raises UserError if it has no packed folder."""
    packed, results = entry.folder / "packed", read_figures(entry.folder / RESULTS)
    if not packed.is_dir():
        raise UserError(f"{entry.folder}: has no packed model to compare: leave out training.pack=false")
    model, _ = load_model(packed, dtype=torch.float32)
    figures = test.measure(model)
    del model
    speed, engine, memory = running(packed)
    return Row(
        method=entry.method,
        seed=entry.seed,
        bits=results["bits_per_quantized_weight"],
        bits_per_parameter=results["bits_per_weight"],
        coverage=results["quantized_share"],
        bytes=sum(file.stat().st_size for file in packed.glob("*.safetensors")),
        minutes=results["minutes"],
        tokens=results.get("training", {}).get("tokens", 0),
        tokens_per_second=speed,
        engine=engine,
        memory=memory,
        curve=curve(entry.folder / CSV_NAME),
        **asdict(figures),
    )


def running(folder: Path) -> tuple[float, str, int]:
    """Tokens per second of greedy decoding, by which engine, and the bytes of weights in memory."""
    model, tokenizer, description = open_engine(str(folder))
    name = description.removeprefix("engine: ")
    if not isinstance(model, Engine):
        return decoding_speed(model, tokenizer), name, weight_bytes(model)
    prompt = tokenizer("def ").input_ids
    for _ in model.generate(prompt, Sampling(max_new_tokens=2)):
        pass  # warms up
    began = time.perf_counter()
    tokens = sum(1 for _ in model.generate(prompt, Sampling(max_new_tokens=SPEED_TOKENS)))
    return tokens / (time.perf_counter() - began), name, model.weight_bytes()


def curve(log: Path) -> list[tuple[float, float]]:
    """Minutes of training, and the loss there."""
    if not log.is_file():
        return []
    return [(float(row["elapsed_sec"]) / 60, float(row["train_loss"])) for row in read_rows(log) if row["train_loss"]]
