"""Compare tokens per second of packed models: native engine, transformers with our kernels, torch in bf16, llama.cpp.

    python -m benchmarks.decode [--quick] [--json] [--parts native,hf,...] [--rounds 7] [--threads 1,2]

The models are known shapes with random weights, batch 1 and an int8 head. In each round, every case runs one burst. A
figure is a ratio between two bursts in the same round, so that a busy machine slows down both; it is the median over
all rounds. llama.cpp quantizes the same shape itself, to TQ2_0. The small model's rows do not fit TQ2_0's blocks, so
llama.cpp falls back to 4 bits there; that or Q4_0 counts, whichever is faster.

native  the native engine at 1.1 B parameters: ternary, Fairy2i W2 and W1, decoding and reading 128 tokens
hf      `generate` of a transformers model with packed layers
bf16    the native engine against the same model in bf16 in torch: speed and memory
small   the native engine in SmolLM2-135M's shape
lut     2-bit tables of rank 1 against ternary
fused   `generate` with fused MLPs and norms against without, in SmolLM2-135M's shape (not by default)
rotate  the native engine with rotated inputs against without, in both shapes (not by default)
gguf    the native engine over llama.cpp on the same file: ternary in Q2_0, SmolLM2-135M's shape (not by default)
serve   eight streams of `wf serve` against one
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks import llama_cpp_peer as peer
from benchmarks import quality, shapes
from wrinklefree.engine.engine import Engine
from wrinklefree.engine.sampling import Sampling
from wrinklefree.models.gguf import gguf_folder

Figures = dict[str, Any]
Burst = Callable[[], float]  # tokens a second, once

DECODED, PROMPT = peer.DECODED, peer.PROMPT


def decoding(engine: Engine) -> Burst:
    def burst() -> float:
        slot = engine.open(list(range(3, 11)), Sampling(max_new_tokens=DECODED + 1))
        engine.step()
        before = time.perf_counter()
        for _ in range(DECODED):
            engine.step()
        spent = time.perf_counter() - before
        engine.close(slot)
        return DECODED / spent

    return burst


def reading(engine: Engine) -> Burst:
    turn = iter(range(10**9))

    def burst() -> float:
        first = next(turn) % 1000  # a prompt that is not in the cache yet
        slot = engine.open([first + 3, *range(3, 2 + PROMPT)], Sampling(max_new_tokens=1))
        before = time.perf_counter()
        engine.step()
        spent = time.perf_counter() - before
        engine.close(slot)
        return PROMPT / spent

    return burst


def generating(model: LlamaForCausalLM, threads: int) -> Burst:
    """A burst of `generate`. The first token, which includes reading the prompt, is not counted."""
    ids = torch.arange(3, 11).unsqueeze(0)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def timed(count: int) -> float:
        before = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, **options)
        return time.perf_counter() - before

    def burst() -> float:
        torch.set_num_threads(threads)
        with torch.no_grad():
            return DECODED / (timed(DECODED + 1) - timed(1))

    return burst


def rounds(bursts: dict[str, Burst], count: int) -> dict[str, list[float]]:
    """Run all bursts in turn, `count` times, after a round of warm-up. Returns tokens per second for each burst."""
    speeds: dict[str, list[float]] = {name: [] for name in bursts}
    for turn in range(count + 1):
        for name, burst in bursts.items():
            speed = burst()
            if turn:
                speeds[name].append(speed)
    return speeds


def over(speeds: dict[str, list[float]], name: str, other: str) -> float:
    """The median ratio of two speeds in the same round."""
    return statistics.median(a / b for a, b in zip(speeds[name], speeds[other], strict=True))


def medians(speeds: dict[str, list[float]]) -> Figures:
    return {f"{name}_tokens_per_second": statistics.median(values) for name, values in speeds.items()}


def as_peer(shape: shapes.Shape) -> peer.Shape:
    return peer.Shape(shape.num_layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.vocab)


def native(threads: int, count: int, files: Path) -> Figures:
    """Speed of the native engine over llama.cpp's with TQ2_0, decoding and reading a prompt."""
    shape = shapes.SHAPES["llama_1b"]
    worker = peer.Worker(peer.quantized(as_peer(shape), "TQ2_0", files), threads)
    engines = {kind: shapes.random_engine(shape, kind, threads) for kind in ("ternary", "w2", "w1")}
    last: Figures = {}

    def theirs() -> float:
        last.update(worker.burst())
        return last["decode"]

    bursts: dict[str, Burst] = {"tq2_0": theirs, "tq2_0_prompt": lambda: last["prefill"]}
    bursts |= {kind: decoding(engine) for kind, engine in engines.items()}
    bursts["ternary_prompt"] = reading(engines["ternary"])
    speeds = rounds(bursts, count)
    worker.close()
    figures = {f"native_{kind}_{threads}t": over(speeds, kind, "tq2_0") for kind in engines}
    figures[f"prefill_ternary_{threads}t"] = over(speeds, "ternary_prompt", "tq2_0_prompt")
    return figures | {f"native_{name}_{threads}t": value for name, value in medians(speeds).items()}


def transformers(threads: int, count: int, files: Path) -> Figures:
    """Speed of `generate` with packed layers, over llama.cpp's decoding with TQ2_0."""
    shape = shapes.SHAPES["llama_1b"]
    worker = peer.Worker(peer.quantized(as_peer(shape), "TQ2_0", files), threads)
    bursts: dict[str, Burst] = {"tq2_0": lambda: worker.burst()["decode"]}
    for kind in ("ternary", "w2", "w1"):
        bursts[kind] = generating(shapes.random_model(shape, kind), threads)
    speeds = rounds(bursts, count)
    worker.close()
    figures = {f"hf_{kind}_{threads}t": over(speeds, kind, "tq2_0") for kind in ("ternary", "w2", "w1")}
    return figures | {f"hf_{name}_{threads}t": value for name, value in medians(speeds).items()}


def against_bf16(threads: int, count: int) -> Figures:
    """Speed of the native engine over a dense bf16 model in torch, and the ratio of the memory for weights."""
    shape = shapes.SHAPES["llama_1b"]
    dense = dense_model(shape)
    engines = {kind: shapes.random_engine(shape, kind, threads) for kind in ("w2", "w1")}
    bursts = {"bf16": generating(dense, threads)} | {kind: decoding(engine) for kind, engine in engines.items()}
    speeds = rounds(bursts, count)
    figures = {f"native_{kind}_vs_bf16": over(speeds, kind, "bf16") for kind in engines}
    whole = sum(p.nbytes for p in dense.parameters())
    figures |= {f"memory_{kind}_vs_bf16": engine.weight_bytes() / whole for kind, engine in engines.items()}
    return figures | {f"{name}_bf16_part": value for name, value in medians(speeds).items()}


def dense_model(shape: shapes.Shape) -> LlamaForCausalLM:
    """A model with random bf16 weights. Its head is tied to the embedding, as in the packed models."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(shapes.llama_config(shape)).eval()
    torch.set_default_dtype(before)
    return model


def decoded(worker: peer.Worker) -> float:
    """Tokens per second of one burst of llama.cpp."""
    return worker.burst()["decode"]


def small(threads: int, count: int, files: Path) -> Figures:
    """Speed of the native engine over llama.cpp's best type, in SmolLM2-135M's shape."""
    shape = shapes.SHAPES["smollm2_135m"]
    workers = {kind: peer.Worker(peer.quantized(as_peer(shape), kind, files), threads) for kind in ("TQ2_0", "Q4_0")}
    bursts: dict[str, Burst] = {kind: partial(decoded, worker) for kind, worker in workers.items()}
    for kind in ("ternary", "w2", "w1"):
        bursts[kind] = decoding(shapes.random_engine(shape, kind, threads))
    speeds = rounds(bursts, count)
    for worker in workers.values():
        worker.close()
    best = max(workers, key=lambda kind: statistics.median(speeds[kind]))
    figures = {f"smollm_native_{threads}t": over(speeds, "ternary", best)}
    figures |= {f"smollm_native_{kind}_{threads}t": over(speeds, kind, best) for kind in ("w2", "w1")}
    return figures | {f"smollm_{name.lower()}_{threads}t": value for name, value in medians(speeds).items()}


def tables(threads: int, count: int) -> Figures:
    """Decoding time with 2-bit tables of rank 1, over that with ternary weights."""
    engines = {kind: shapes.random_engine("llama_1b", kind, threads) for kind in ("ternary", "lut2_rank1")}
    speeds = rounds({kind: decoding(engine) for kind, engine in engines.items()}, count)
    return {f"lut2_rank1_time_over_ternary_{threads}t": over(speeds, "ternary", "lut2_rank1"), **medians(speeds)}


def fused(threads: int, count: int) -> Figures:
    """Speed of `generate` with fused MLPs and norms (packed/products/fused.py), over the same model without them."""
    shape, figures = shapes.SHAPES["smollm2_135m"], Figures()
    for kind in ("ternary", "w1"):
        ways = {"plain": False, "fused": True}
        models = {name: shapes.random_model(shape, kind, fused=value) for name, value in ways.items()}
        speeds = rounds({name: generating(model, threads) for name, model in models.items()}, count)
        figures |= {f"{name}_{kind}_{threads}t": value for name, value in medians(speeds).items()}
        figures[f"fused_{kind}_{threads}t"] = over(speeds, "fused", "plain")
    return figures


def rotation(threads: int, count: int) -> Figures:
    """Speed of the native engine with rotated inputs (core/rotation.py) over without, decoding and reading a prompt."""
    figures: Figures = {}
    for shape in ("smollm2_135m", "llama_1b"):
        engines = {turned: shapes.random_engine(shape, "w2", threads, rotated=turned) for turned in (False, True)}
        bursts = {f"w2_{shape}_{turned}": decoding(engine) for turned, engine in engines.items()}
        bursts |= {f"prompt_{shape}_{turned}": reading(engine) for turned, engine in engines.items()}
        speeds = rounds(bursts, count)
        for what in ("w2", "prompt"):
            figures[f"rotated_{what}_{shape}"] = over(speeds, f"{what}_{shape}_True", f"{what}_{shape}_False")
        figures |= medians(speeds)
    return figures


def same_file(threads: int, count: int, files: Path) -> Figures:
    """Speed of the native engine over llama.cpp's, on one file in Q2_0 with embedding and head in Q8_0."""
    file = peer.ternary(as_peer(shapes.SHAPES["smollm2_135m"]), files)
    worker = peer.Worker(file, threads)
    engine = Engine.from_folder(gguf_folder(file, "packed"), threads, context=512)
    last: Figures = {}

    def theirs() -> float:
        last.update(worker.burst())
        return last["decode"]

    bursts: dict[str, Burst] = {"mainline": theirs, "mainline_prompt": lambda: last["prefill"]}
    bursts |= {"ours": decoding(engine), "ours_prompt": reading(engine)}
    speeds = rounds(bursts, count)
    worker.close()
    figures = {f"gguf_q2_0_vs_mainline_{threads}t": over(speeds, "ours", "mainline")}
    figures[f"gguf_q2_0_prompt_vs_mainline_{threads}t"] = over(speeds, "ours_prompt", "mainline_prompt")
    return figures | {f"gguf_q2_0_{name}_{threads}t": value for name, value in medians(speeds).items()}


def parts(args: argparse.Namespace) -> Figures:
    """The figures of all chosen parts."""
    chosen, count = args.parts.split(","), 2 if args.quick else args.rounds
    figures: Figures = {}
    for threads in (int(number) for number in args.threads.split(",")):
        if "native" in chosen:
            figures |= native(threads, count, args.files)
        if "hf" in chosen:
            figures |= transformers(threads, count, args.files)
        if "small" in chosen:
            figures |= small(threads, count, args.files)
        if "gguf" in chosen:
            figures |= same_file(threads, count, args.files)
    if "bf16" in chosen:
        figures |= against_bf16(1, count)
    if "lut" in chosen:
        figures |= tables(1, count)
    if "fused" in chosen:
        figures |= fused(1, count)
    if "rotate" in chosen:
        figures |= rotation(1, count)
    if "serve" in chosen:
        from benchmarks import serving

        with tempfile.TemporaryDirectory() as scratch:
            speeds = serving.streams(serving.random_folder(Path(scratch) / "packed"), 8, rounds=min(count, 3))
        figures |= {"serve_8_streams": speeds["ratio"], "serve_one_stream": speeds["one"], "serve_all": speeds["many"]}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--parts", default="native,hf,bf16,small,lut,serve", help="comma-separated")
    parser.add_argument("--rounds", type=int, default=7, help="bursts per case")
    parser.add_argument("--threads", default="1,2", help="comma-separated")
    parser.add_argument("--files", type=Path, default=Path("outputs/peers"), help="folder for llama.cpp's files")
    quality.print_figures(parser.parse_args(), parts)


if __name__ == "__main__":
    main()
