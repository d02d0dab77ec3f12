"""Compare the native kernels with torch: microseconds and GB/s of one matrix product, with weights from memory.

    python -m benchmarks.kernels [--json] [--shapes 4096x4096,...] [--threads 1,2] [--batch 1]

A burst multiplies each of many matrices once. Together they are larger than the cache, so weights come from memory.
Cases take turns, and each figure is the best of several bursts, so that a busy moment of the machine does not count.
`probe` is the speed at which a plain sum reads memory. The lines of torch are its own products with fp32 and bf16
weights of the same shape.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core import library
from wrinklefree.packed.products import native
from wrinklefree.packed.products.native import Matrix

COLD = 200e6  # bytes of weights in one burst, several times the last cache
BURSTS = 12
SHAPES = "576x576,1536x576,2048x2048,4096x4096,11008x4096"


@dataclass(frozen=True)
class Case:
    """One line of the table. `product(i)` multiplies the i-th of `count` matrices, of `nbytes` bytes each."""

    kind: str
    kernel: str
    count: int
    nbytes: int
    product: Callable[[int], object]

    def burst(self) -> float:
        """Multiply every matrix once, and return the mean seconds of one product."""
        start = time.perf_counter()
        for i in range(self.count):
            self.product(i)
        return (time.perf_counter() - start) / self.count


def codes(most: int, *shape: int) -> Tensor:
    return torch.randint(most, shape, dtype=torch.uint8)


def ternary(n: int, k: int, groups: int = 1) -> Matrix:
    return Matrix.table(codes(3, n, k), torch.tensor([-1.0, 0.0, 1.0, 0.0]), torch.rand(1, groups) + 1)


def fairy(n: int, k: int, stages: int, rows: int = 1, grid: bool = True) -> Matrix:
    scales = torch.randint(1, 30, (2, stages, 2, rows, 1)).float()
    return Matrix.complex(codes(4, 2, stages, n // 2, k // 2), scales if grid else scales + torch.rand(scales.shape))


KINDS: dict[str, Callable[[int, int], Matrix]] = {
    "ternary": ternary,
    "ternary, groups of 64": lambda n, k: ternary(n, k, k // 64),
    "2-bit table": lambda n, k: Matrix.table(codes(4, n, k), torch.tensor([-1.0, -0.27, 0.27, 1.0]), torch.ones(1, 1)),
    "4-bit table": lambda n, k: Matrix.table(codes(16, n, k), torch.randn(16), torch.ones(1, 1)),
    "Fairy2i W1": lambda n, k: fairy(n, k, 1),
    "Fairy2i W1, rows": lambda n, k: fairy(n, k, 1, n // 2),
    "Fairy2i W2": lambda n, k: fairy(n, k, 2),
    "Fairy2i W2, rows": lambda n, k: fairy(n, k, 2, n // 2),
    "Fairy2i W2, no grid": lambda n, k: fairy(n, k, 2, 1, False),
    "int8": lambda n, k: Matrix.int8(codes(255, n, k).to(torch.int8), torch.ones(n)),
}


def probe() -> Case:
    """A case that sums memory with torch's threads."""
    memory = torch.ones(int(COLD) // 4)
    return Case("probe", "", 1, memory.nbytes, lambda _: memory.sum())


def kernel_case(kind: str, n: int, k: int, x: Tensor, threads: int) -> Case:
    first, pool = KINDS[kind](n, k), library.Pool(threads)
    matrices = [first] + [KINDS[kind](n, k) for _ in range(min(60, int(COLD / first.nbytes)))]
    product = lambda i: native.matmul([matrices[i]], x, native.INT8, pool)  # noqa: E731
    return Case(kind, first.kernel, len(matrices), first.nbytes, product)


def torch_case(dtype: torch.dtype, n: int, k: int, x: Tensor) -> Case:
    size = n * k * dtype.itemsize
    weights = [torch.randn(n, k).to(dtype) for _ in range(1 + int(COLD / size))]
    inputs, name = x.to(dtype), f"torch {str(dtype).removeprefix('torch.')}"
    return Case(name, "", len(weights), size, lambda i: F.linear(inputs, weights[i]))


def rows(shape: str, threads: int, batch: int) -> list[dict[str, Any]]:
    """Measure all cases for one shape, in turns. Ratios to torch above 1 mean faster than torch."""
    n, k = map(int, shape.split("x"))
    torch.set_num_threads(threads)
    x = torch.randn(batch, k)
    cases = [probe(), *(torch_case(dtype, n, k, x) for dtype in (torch.float32, torch.bfloat16))]
    cases += [kernel_case(kind, n, k, x, threads) for kind in KINDS]
    with torch.inference_mode():
        bursts = [[case.burst() for case in cases] for _ in range(BURSTS)]
    seconds = [min(each) for each in zip(*bursts, strict=True)]
    same = {"shape": shape, "threads": threads, "batch": batch}
    return [
        same
        | {"kind": case.kind, "kernel": case.kernel, "us": 1e6 * best, "gbs": case.nbytes / best / 1e9}
        | {"vs_fp32": seconds[1] / best, "vs_bf16": seconds[2] / best}
        for case, best in zip(cases, seconds, strict=True)
    ]


def show(measured: Sequence[dict[str, Any]]) -> None:
    """Print the rows of one shape."""
    first = measured[0]
    print(f"{first['shape']}, {first['threads']} threads, batch {first['batch']}; speed over torch fp32 and bf16")
    for row in measured:
        ratios = f"{row['vs_fp32']:6.1f}x {row['vs_bf16']:6.1f}x"
        print(f"  {row['kind']:<24} {row['us']:9.1f} us {row['gbs']:6.1f} GB/s  {ratios}  {row['kernel']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    everything = []
    for shape in args.shapes.split(","):
        for threads in map(int, args.threads.split(",")):
            measured = rows(shape, threads, args.batch)
            everything += measured
            if not args.json:
                show(measured)
    if args.json:
        print(json.dumps({"isa": library.isa(), "rows": everything}))


if __name__ == "__main__":
    main()
