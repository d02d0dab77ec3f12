"""The gradients of one step over four rows, for every objective, with the rows cut into micro-batches and processes.

    RANK=0 WORLD_SIZE=2 ... python tests/training/cutting.py FOLDER      one of two processes; writes FOLDER/0.pt

`gradients(case, rows)` takes the steps of one group of micro-batches in this process. `rows` are the rows of each.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import VOCAB, llama

from wrinklefree.config.schema import AttentionConfig, DistillationConfig, HiddenConfig
from wrinklefree.config.thinking import GRPOConfig, InjectionConfig, NetworkConfig, ThinkingConfig
from wrinklefree.core.batch import Batch
from wrinklefree.data import chains
from wrinklefree.distributed.sharding import Whole
from wrinklefree.distributed.world import ALONE, World, join_world, leave_world
from wrinklefree.objectives.base import Objective
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking.grpo import GRPO, Rollout
from wrinklefree.thinking.hidden_pairs import HiddenPairs, Pair
from wrinklefree.thinking.injection import Injection
from wrinklefree.thinking.network import LatentThinker, make_thinker
from wrinklefree.thinking.reconstruction import Reconstruction, mark
from wrinklefree.thinking.recursion import Recursion
from wrinklefree.thinking.speech import Speaker
from wrinklefree.training.microbatches import steps

LENGTH = 12
TOKENIZER = chains.tokenizer()

Rows = list[list[int]]
Take = Callable[[list[int]], Batch]


class Case(NamedTuple):
    model: nn.Module
    objective: Objective
    take: Take  # a batch of these rows


def text(rows: list[int]) -> Batch:
    """Rows of unlike lengths in documents of unlike lengths, with unlike numbers of labels; the rest is padding."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCAB, (4, LENGTH), generator=draw)
    positions, labels = torch.zeros(4, LENGTH, dtype=torch.long), torch.full((4, LENGTH), -100)
    for row, (first, second, unlearned) in enumerate([(7, 5, 0), (3, 0, 0), (4, 4, 5), (6, 1, 2)]):
        positions[row, :first], positions[row, first : first + second] = torch.arange(first), torch.arange(second)
        labels[row, unlearned : first + second] = ids[row, unlearned : first + second]
    return {"input_ids": ids[rows], "labels": labels[rows].masked_fill(positions[rows] == 0, -100)} | {
        "position_ids": positions[rows]
    }


def cached(rows: list[int]) -> Batch:
    """Text with a teacher's answers."""
    draw = torch.Generator().manual_seed(4)
    logits, ids = torch.randn(4, LENGTH - 1, VOCAB, generator=draw).mul(3).topk(8)
    rest = torch.randn(4, LENGTH - 1, generator=draw)
    return text(rows) | {"kd_ids": ids[rows], "kd_logits": logits[rows], "kd_rest": rest[rows]}


def pairs(rows: list[int]) -> Batch:
    """Hidden pairs of unlike lengths."""
    draw = torch.Generator().manual_seed(5)

    def ids(length: int) -> Tensor:
        return torch.randint(6, len(TOKENIZER), (length,), generator=draw).int()

    some = HiddenPairs.__new__(HiddenPairs)
    some.pairs = [
        Pair(ids(p), ids(t), ids(a), torch.randn(p, 16, generator=draw), torch.randn(s, 16, generator=draw), ids(s))
        for p, t, a, s in [(5, 4, 1, 2), (3, 6, 3, 1), (6, 2, 2, 4), (4, 3, 4, 3)]
    ]
    return some.batch(rows)


class Sampled(GRPO):
    """GRPO whose sampled answers depend on the prompt alone, and of which some prompts have none that is kept."""

    def roll_out(self, batch: Batch) -> Rollout:
        samples, answers, advantages, kept = [], list[Tensor](), list[float](), list[bool]()
        for row, prompt in enumerate(batch["input_ids"]):
            draw = torch.Generator().manual_seed(int(prompt.sum()))
            number = int(prompt[0]) % 3 * 2
            kept.append(number > 0)
            for _ in range(number):
                length = int(torch.randint(1, 4, (), generator=draw))
                samples.append(row)
                answers.append(torch.randint(6, len(TOKENIZER), (length,), generator=draw))
                advantages.append(float(torch.randn((), generator=draw)))
        share = torch.tensor(kept).float().mean()
        return Rollout(samples, answers, torch.tensor(advantages), share / 2, share)


def language(**values: Any) -> Case:
    student, teacher = llama(), llama(intermediate_size=160)
    for parameter in teacher.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    config = DistillationConfig(name="x", **values)
    return Case(student, LanguageModelling(student, config, teacher.requires_grad_(False)), text)


def from_cache(**values: Any) -> Case:
    student = llama()
    return Case(student, CachedKD(student, DistillationConfig(name="x", **values)), cached)


def thinker(mode: str = "trajectory") -> tuple[LatentThinker, Speaker]:
    lm = llama(vocab_size=len(TOKENIZER), tie_word_embeddings=False).requires_grad_(False)
    network = NetworkConfig(mode=mode, hidden_size=32, num_heads=2, max_thoughts=4, ema_decay=0.0)  # type: ignore[arg-type]
    made = make_thinker(lm, ThinkingConfig(d_compressed=16, network=network))
    for parameter in made.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return made, Speaker(lm, TOKENIZER)


def recursion(mode: str, sampling: bool = False) -> Case:
    made, speaker = thinker(mode)
    config = NetworkConfig(mode=mode, max_thoughts=3, noise=0.0, mse_weight=1.0)  # type: ignore[arg-type]
    objective = Recursion(made, speaker.decoder, config)
    objective.sampling = sampling
    return Case(made, objective, pairs)


def injection() -> Case:
    made, speaker = thinker()
    return Case(made, Injection(made, speaker, InjectionConfig()), pairs)


def grpo(**values: Any) -> Case:
    made, speaker = thinker()
    objective = Sampled(made, speaker, GRPOConfig(trains="all", **values))
    for parameter in objective.reference.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return Case(made, objective, pairs)


def reconstruction(kind: str) -> Case:
    made, _ = thinker()
    decoder = BodyAndHead(llama().requires_grad_(False))
    metric = torch.eye(64) if kind == "fisher" else None
    objective = Reconstruction(made.compressor, decoder, kind, metric)
    return Case(made.compressor, objective, lambda rows: mark(text(rows), int(text([3])["input_ids"][0, -1])))


HIDDEN = HiddenConfig(enabled=True, layer_weights="uniform")
CASES: dict[str, Callable[[], Case]] = {
    "ce": lambda: language(weight=0.0),
    "kl": lambda: language(weight=2.0, temperature=3.0),
    "attention": lambda: language(weight=1.0, attention=AttentionConfig(weight=10.0, split_heads=4)),
    "hidden": lambda: language(weight=1.0, hidden=HIDDEN),
    "all": lambda: language(weight=1.0, hidden=HIDDEN, attention=AttentionConfig(weight=10.0, split_heads=4)),
    "cached": lambda: from_cache(weight=1.0, ce_weight=0.5, hard_top1=0.2),
    "hard full": lambda: from_cache(weight=1.0, ce_weight=0.0, hard_top1=0.1, hard_full=0.5),
    "trajectory": lambda: recursion("trajectory"),
    "own thoughts": lambda: recursion("trajectory", sampling=True),
    "final": lambda: recursion("final"),
    "injection": injection,
    "grpo": lambda: grpo(updates=2),
    "dr_grpo": lambda: grpo(advantage="dr_grpo", max_answer_tokens=4),
    "mse": lambda: reconstruction("mse"),
    "reading": lambda: reconstruction("kl"),
    "fisher": lambda: reconstruction("fisher"),
}


def gradients(case: Case, rows: Rows, world: World = ALONE) -> list[dict[str, Tensor]]:
    """The gradients, and under `-` the means of the log, of each optimizer step on these micro-batches."""
    placement = Whole(world)
    run = SimpleNamespace(
        model=case.model,
        objective=case.objective,
        stream=iter([case.take(some) for some in rows]),
        training=SimpleNamespace(gradient_accumulation_steps=len(rows)),
        world=world,
        placement=placement,
        autocast=nullcontext,
    )
    return list(_steps(run, placement))


def _steps(run: Any, placement: Whole) -> Iterator[dict[str, Tensor]]:
    named = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    rounds = steps(run)
    while (step := next(rounds, None)) is not None:
        sums: dict[str, Tensor] = {}
        for loss, values in step:
            loss.backward()
            sums = {name: sums.get(name, 0) + value for name, value in values.items()}
        placement.finish_gradients(named.values(), 1 / step.count)
        found = {name: p.grad for name, p in named.items() if p.grad is not None}
        yield found | {f"-{name}": torch.tensor(value) for name, value in step.means(sums).items()}
        for parameter in named.values():  # later rounds start from weights that have moved
            parameter.data -= 0 if parameter.grad is None else 0.01 * parameter.grad
            parameter.grad = None


def main() -> None:
    world = join_world()
    halves = [[0], [1]] if world.rank == 0 else [[2], [3]]
    found = {}
    for name, make in CASES.items():
        torch.manual_seed(0)
        found[name] = gradients(make(), halves, world)
    torch.save(found, Path(sys.argv[1]) / f"{world.rank}.pt")
    leave_world()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
