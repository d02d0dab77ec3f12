"""Could W1 draft tokens for W2? Speeds of both, and what acceptance it would take.

    python -m benchmarks.speculative [--shape smollm2_135m] [--json]

A round drafts k tokens with W1, and W2 then reads k + 1 tokens at once. If each draft is accepted with probability a, a
round gives (1 - a^(k+1)) / (1 - a) tokens. It takes k w1 + w2(k + 1), w1 being the time of a W1 step and w2(n) that of
a W2 step over n tokens. Times are CPU seconds of one thread, which other jobs on the machine hardly change.
"""

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.shapes import SHAPES, random_engine
from wrinklefree.engine.binding import Append, c_sampling
from wrinklefree.engine.sampling import Sampling

DRAFTS = (1, 2, 3, 4, 7)
ROUNDS, PROMPT = 15, 32


def step_seconds(shape: str, kind: str, sizes: tuple[int, ...]) -> dict[int, float]:
    """Seconds of a step that reads so many tokens of one sequence and gives the logits of each."""
    engine = random_engine(shape, kind, 1)
    decoder, sampling = engine._decoder, c_sampling(Sampling(), 1)
    decoder.step([Append(0, [1] * PROMPT)])
    taken: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(ROUNDS):
        for size in sizes:
            logits = np.empty((size, engine.vocab), np.float32)
            start = time.process_time()
            decoder.step([Append(0, [2] * size, sampling, logits)])
            taken[size].append(time.process_time() - start)
            decoder.truncate(0, PROMPT)
    return {size: statistics.median(times) for size, times in taken.items()}


def speed(accepted: float, drafts: int, draft: float, check: float) -> float:
    """Tokens per time of one W2 token, for costs in that time."""
    tokens = drafts + 1 if accepted == 1 else (1 - accepted ** (drafts + 1)) / (1 - accepted)
    return tokens / (drafts * draft + check)


def measure(shape: str) -> dict[str, float]:
    """Costs over that of one W2 token, and the best speed at some rates of acceptance."""
    w1 = step_seconds(shape, "w1", (1,))[1]
    w2 = step_seconds(shape, "w2", (1, *(k + 1 for k in DRAFTS)))
    costs = {size: seconds / w2[1] for size, seconds in w2.items()}
    figures = {"w1_over_w2": w1 / w2[1]} | {f"w2_{n}_tokens": cost for n, cost in costs.items()}
    for accepted in (0.4, 0.6, 0.8, 1.0):
        figures[f"best_speed_at_{accepted}"] = max(speed(accepted, k, w1 / w2[1], costs[k + 1]) for k in DRAFTS)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2_135m")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    figures = measure(args.shape)
    print(json.dumps(figures) if args.json else "\n".join(f"{name:20} {value:6.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
