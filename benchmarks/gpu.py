"""Compare matrix products of a few tokens on a GPU: our Triton programs, torch.compile, and torch's own in bf16.

    python -m benchmarks.gpu [--json] [--shapes 4096x4096,11008x4096] [--batches 1,4,8]

Each product is first compared with the decoded weight in float64, and a wrong product ends the run. A burst uses more
weights than the cache holds, so they come from memory. The figures are medians of several bursts:

us           GPU time of one product, from a burst that was captured as a CUDA graph
called_us    time of one product in the same burst called from Python, as in a model without CUDA graphs

Without a GPU the exit code is 2.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.method import QuantMethod
from wrinklefree.methods.anemll import Config as Anemll
from wrinklefree.methods.bitdistill import Config as BitDistill
from wrinklefree.methods.fairy2 import Config as Fairy2
from wrinklefree.methods.uniform import Config as Uniform
from wrinklefree.packed.layer import PackedLinear
from wrinklefree.packed.pack import pack_layer
from wrinklefree.packed.products import compiled, triton
from wrinklefree.packed.products.choose import method_layer

COLD = 400e6  # bytes of weights in one burst, several times the last cache
MOST = 64  # matrices in one burst
BURSTS = 15
ALLOWED = 1e-4  # of the largest result

Call = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Case:
    """One line of the table. Each of `calls` multiplies `x` by another matrix."""

    kind: str
    by: str
    nbytes: int  # of one matrix
    calls: Sequence[Call]
    x: Tensor

    def burst(self) -> None:
        """Run every product once."""
        for call in self.calls:
            call(self.x)


def half(*shape: int) -> Tensor:
    """Random positive numbers that fp16 represents exactly, as an fp32 tensor."""
    return (torch.rand(shape) + 0.5).half().float()


def below(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, dtype=torch.uint8)


def fairy(n: int, k: int, stages: int) -> Codes:
    tensors = {"scales": half(2, stages, 2, 1, 1), "rows": half(n // 2), "columns": half(k // 2)}
    return Codes(below(4, 2, stages, n // 2, k // 2), 2, tensors, (n, k))


def ranks(n: int, k: int) -> Codes:
    return Codes(below(4, n, k), 2, {"lut": half(4), "a": half(n, 4), "b": half(4, k)}, (n, k))


KINDS: dict[str, tuple[QuantMethod, Callable[[int, int], Codes]]] = {
    "ternary": (BitDistill(), lambda n, k: Codes(below(3, n, k), 2, {"scales": half(1, 1)}, (n, k))),
    "Fairy2i W1": (Fairy2(num_stages=1), lambda n, k: fairy(n, k, 1)),
    "Fairy2i W2": (Fairy2(num_stages=2), lambda n, k: fairy(n, k, 2)),
    "3-bit": (Uniform(bits=3), lambda n, k: Codes(below(7, n, k), 3, {"scales": half(n, 1)}, (n, k))),
    "2-bit table, 4 ranks": (Anemll(rank=4), ranks),
}


def by_triton(layer: PackedLinear) -> Call | None:
    codes = layer.codes()
    product = triton.product(method_layer(layer).form(codes), codes, layer.weight.device)
    return None if product is None else lambda x: product.few(layer.weight, x)


def by_compiler(layer: PackedLinear) -> Call:
    product = compiled.product(layer, method_layer(layer), layer.codes())
    return lambda x: product.few(layer.weight, x)


def copies(nbytes: int) -> int:
    return max(1, min(MOST, int(COLD / nbytes)))


def cases(n: int, k: int, x: Tensor) -> list[Case]:
    """The bf16 case first, then a checked case for each kind and each way to multiply it."""
    dense = [torch.randn(n, k, device=x.device, dtype=torch.bfloat16) for _ in range(copies(2 * n * k))]
    all_cases = [Case("bf16", "torch", 2 * n * k, [partial(F.linear, weight=w) for w in dense], x)]
    for kind, (method, make) in KINDS.items():
        first = pack_layer(PackedLinear, method, make(n, k)).to(x.device)
        nbytes = sum(buffer.nbytes for buffer in first.buffers())
        layers = [first, *(copy.deepcopy(first) for _ in range(copies(nbytes) - 1))]
        ways: dict[str, list[Any]] = {
            "triton": [by_triton(layer) for layer in layers],
            "compiled": [by_compiler(layer) for layer in layers],
        }
        for by, calls in ways.items():
            known = [call for call in calls if call is not None]
            if known:
                check(f"{kind}, {by}", known[0], first, x)
                all_cases.append(Case(kind, by, nbytes, known, x))
    return all_cases


def check(name: str, call: Call, layer: PackedLinear, x: Tensor) -> None:
    """Raise SystemExit if a product differs from that with the decoded weight."""
    y, expected = call(x), x.double() @ layer.method.decode(layer.codes()).double().T
    if y is None:
        raise SystemExit(f"{name}: could not be compiled; see above")
    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    if not error < ALLOWED:
        raise SystemExit(f"{name}: off by {error:.1e} of the largest result")


def called(case: Case) -> float:
    """Mean seconds of one product when a burst is called from Python."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    case.burst()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(case.calls)


def captured(case: Case) -> Callable[[], float]:
    """Capture a burst as a CUDA graph. Returns a function that replays it and returns GPU seconds per product."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # everything is compiled and allocated before the capture
        case.burst()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.burst()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def replay() -> float:
        events[0].record()
        graph.replay()
        events[1].record()
        torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / len(case.calls)

    return replay


@torch.no_grad()
def rows(shape: str, batch: int) -> list[dict[str, Any]]:
    """Measure all cases for one shape, in turns. Ratios to bf16 above 1 mean faster than bf16."""
    n, k = map(int, shape.split("x"))
    all_cases = cases(n, k, torch.randn(batch, k, device="cuda", dtype=torch.bfloat16))
    replays = [captured(case) for case in all_cases]
    pairs = list(zip(replays, all_cases, strict=True))
    bursts = [[(replay(), called(case)) for replay, case in pairs] for _ in range(BURSTS)]
    seconds = [tuple(map(median, zip(*each, strict=True))) for each in zip(*bursts, strict=True)]
    return [
        {"shape": shape, "batch": batch, "kind": case.kind, "by": case.by, "us": 1e6 * on_gpu, "called_us": 1e6 * whole}
        | {
            "gbs": case.nbytes / on_gpu / 1e9,
            "vs_bf16": seconds[0][0] / on_gpu,
            "called_vs_bf16": seconds[0][1] / whole,
        }
        for case, (on_gpu, whole) in zip(all_cases, seconds, strict=True)
    ]


def show(measured: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one shape."""
    first = measured[0]
    print(f"{first['shape']}, batch {first['batch']}; microseconds and ratio to bf16, on the GPU and called")
    for row in measured:
        gpu = f"{row['us']:8.1f} us {row['vs_bf16']:5.2f}x {row['gbs']:7.0f} GB/s"
        print(f"  {row['kind']:<22} {row['by']:<9} {gpu} {row['called_us']:8.1f} us {row['called_vs_bf16']:5.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", default="4096x4096,11008x4096")
    parser.add_argument("--batches", default="1,4,8")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here", file=sys.stderr)
        raise SystemExit(2)
    everything = []
    for shape in args.shapes.split(","):
        for batch in map(int, args.batches.split(",")):
            measured = rows(shape, batch)
            everything += measured
            if not args.json:
                show(measured)
    if args.json:
        print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": everything}))


if __name__ == "__main__":
    main()
