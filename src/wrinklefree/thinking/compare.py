"""`wf trm eval`: every way to think on the same held-out problems, greedily, with controls that show why it works.

    words       the language model thinks aloud
    nothing     <think></think>, then the answer
    pause       constant soft tokens, `max_thoughts` of them, trained on the same batches as the adapter
    shuffled    the soft tokens of another problem
    latent      the thinker's soft tokens, after phase 2
    grpo        the thinker's soft tokens after phase 3, if that was run
    oracle      the true hidden states of the written thought, through the compressor and the adapter of latent

Latency is measured on one problem at a time, from its tokens to the end of its answer. p is McNemar's, against nothing.
"""

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import PairsConfig
from wrinklefree.core.files import write_json
from wrinklefree.core.replaced import let_go
from wrinklefree.data import problems
from wrinklefree.data.problems import Problem
from wrinklefree.distributed.world import join_world
from wrinklefree.evaluate.accuracy import Accuracy
from wrinklefree.evaluate.paired import mcnemar, quantile
from wrinklefree.runs import prerequisites
from wrinklefree.runs.folder import resume_point, writing
from wrinklefree.runs.report import RESULTS
from wrinklefree.thinking import loading, tags
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.pairs import Reader, Writer
from wrinklefree.thinking.recursion import read
from wrinklefree.thinking.speech import Prefix, Speaker
from wrinklefree.tracking.terminal import print_table

log = logging.getLogger("wrinklefree")

BATCH = 250
TIMED = 50  # problems, one at a time
WARM_UP = 3

SoftTokens = tuple[Tensor, Tensor]  # soft tokens [B, M, D], and the mask [B, M] of those that are there


class Way(NamedTuple):
    """A way to think: what makes the soft tokens between the tags. None lets the model think in words."""

    name: str
    soft_tokens: Callable[[Prefix, Sequence[Problem]], SoftTokens] | None


@dataclass
class Row:
    """The figures of a way to think."""

    name: str
    right: list[bool]
    tokens: float  # generated per problem, thought and answer
    seconds: list[float] = field(default_factory=list)  # of single problems
    p_value: float = 1.0  # of the hypothesis that it is neither better nor worse than nothing

    @property
    def accuracy(self) -> Accuracy:
        return Accuracy(sum(self.right), len(self.right))

    def latency(self, share: float) -> float | None:
        """The seconds within which this share of the problems is answered; None if they were not measured."""
        return quantile(self.seconds, share) if self.seconds else None


def compare_ways(config: Config, force: bool) -> Path:
    """Measure all ways, print the table, draw the plot. Raises UserError if no thinker has learned to speak."""
    out = Path(config.output_dir)
    resume_point(config, force)
    settings = loading.settings_of(config).pairs
    found = dict.fromkeys(
        problems.load_problems(settings.problems, "heldout", config.training.eval_examples, settings.num_heldout)
    )
    asked = list(found)
    model, tokenizer = loading.load_language_model(config)
    device = join_world().device
    speaker = Speaker(model.to(device), tokenizer)
    thinkers = {name: thinker.to(device) for name, thinker in _thinkers(config).items()}
    with writing(config, None, force):
        _compare(config, WaysOfThinking(speaker, asked, settings), thinkers)
    return out


def _compare(config: Config, bench: "WaysOfThinking", thinkers: dict[str, LatentThinker]) -> None:
    ways = bench.ways(thinkers)
    rows = [bench.measure(way) for way in ways]
    bench.measure_times(ways, rows)
    nothing = next(row for row in rows if row.name == "nothing")
    for row in rows:
        row.p_value = mcnemar(row.right, nothing.right)
    figures = {"readout": bench.read_out(thinkers["latent"]), "problems": len(bench.asked)}
    print_ways(rows, figures)
    save_ways(rows, figures, Path(config.output_dir))
    thinker = shlex.quote(str(loading.starting_thinker(config)))
    print(f"next: wf generate {thinker} --think latent --prompt {shlex.quote(bench.asked[0].question)}")


def _thinkers(config: Config) -> dict[str, LatentThinker]:
    """The thinkers by name: `latent` after phase 2, and `grpo` after phase 3 if that was run."""
    found = {"latent": loading.inherit(config, Path(prerequisites.stage_model(config, "trm_injection")))}
    if prerequisites.is_done(prerequisites.stage_folder(config, "trm_grpo")):
        found["grpo"] = loading.inherit(config, prerequisites.stage_folder(config, "trm_grpo"))
    return found


class WaysOfThinking:
    """A language model and held-out problems, on which every way to think is measured."""

    def __init__(self, speaker: Speaker, asked: list[Problem], config: PairsConfig) -> None:
        self.speaker, self.asked, self.config = speaker, asked, config
        self.prompts = {p.id: tags.prompt(speaker.tokenizer, p.question) for p in asked}
        self.longest = max(len(speaker.tokenizer(p.gold, add_special_tokens=False).input_ids) for p in asked) + 32

    def ways(self, thinkers: dict[str, LatentThinker]) -> list[Way]:
        """Every way to think, in the order of the table."""
        latent = thinkers["latent"]
        found = [
            Way("words", None),
            Way("nothing", self._nothing),
            Way("pause", partial(self._pause, latent)),
            Way("shuffled", partial(self._shuffled, latent)),
        ]
        found += [Way(name, partial(self._latent, thinker)) for name, thinker in thinkers.items()]
        return [*found, Way("oracle", partial(self._oracle, latent))]

    def _nothing(self, prefix: Prefix, asked: Sequence[Problem]) -> SoftTokens:
        return prefix.states[:, :0], prefix.mask[:, :0]

    def _pause(self, thinker: LatentThinker, prefix: Prefix, asked: Sequence[Problem]) -> SoftTokens:
        soft = thinker.pause.detach().expand(len(prefix.mask), -1, -1)
        return soft, prefix.mask.new_ones(soft.shape[:2])

    def _latent(self, thinker: LatentThinker, prefix: Prefix, asked: Sequence[Problem]) -> SoftTokens:
        thoughts, soft_mask = self.speaker.think(thinker, prefix)
        return thinker.speak(thoughts).detach(), soft_mask

    def _shuffled(self, thinker: LatentThinker, prefix: Prefix, asked: Sequence[Problem]) -> SoftTokens:
        soft_tokens, soft_mask = self._latent(thinker, prefix, asked)
        return soft_tokens.roll(1, 0), soft_mask.roll(1, 0)

    def _oracle(self, thinker: LatentThinker, prefix: Prefix, asked: Sequence[Problem]) -> SoftTokens:
        """Write the thought and read it back, as `wf trm pairs` does."""
        records = Writer(self.speaker.model, self.speaker.tokenizer, self.config).write(
            "heldout", [(problem, 0) for problem in asked], seed=0
        )
        reader = Reader(self.speaker.model, self.speaker.tokenizer, thinker, self.config)
        pairs = reader.read(
            [record if record["thought_ids"] and record["answer_ids"] else _blank(record) for record in records]
        )
        counts = torch.tensor([len(pair.thoughts) for pair in pairs])
        states = torch.nn.utils.rnn.pad_sequence([pair.thoughts for pair in pairs], batch_first=True)
        soft_mask = torch.arange(states.shape[1]) < counts[:, None]
        device = self.speaker.model.device
        return thinker.speak(thinker.whiten(states.to(device))).detach(), soft_mask.to(device)

    def measure(self, way: Way) -> Row:
        """Answer all problems in batches, and count the right answers and the tokens."""
        right: list[bool] = []
        tokens = 0
        for start in range(0, len(self.asked), BATCH):
            asked = self.asked[start : start + BATCH]
            said = self._answers(way, asked)
            right += [self._is_right(way, ids, problem) for ids, problem in zip(said, asked, strict=True)]
            tokens += sum(map(len, said))
        log.info("%s: %.1f %% of %d right", way.name, 100 * sum(right) / len(right), len(right))
        return Row(way.name, right, tokens / len(right))

    def measure_times(self, ways: Sequence[Way], rows: Sequence[Row]) -> None:
        """Fill in the latencies. All ways take turns on each problem, so that a busy machine slows all of them.

        The oracle has none: it writes its thought first, so its latency would say nothing about soft tokens.
        """
        timed = [(way, row) for way, row in zip(ways, rows, strict=True) if way.name != "oracle"]
        for number, problem in enumerate(self.asked[: TIMED + WARM_UP]):
            for way, row in timed:
                started = time.perf_counter()
                self._answers(way, [problem])
                if number >= WARM_UP:
                    row.seconds.append(time.perf_counter() - started)

    @torch.inference_mode()
    def _answers(self, way: Way, asked: Sequence[Problem]) -> list[list[int]]:
        prefix = self.speaker.prefill([self.prompts[problem.id] for problem in asked])
        if way.soft_tokens is None:
            room = self.config.max_new_tokens + self.longest
            return self.speaker.answer(prefix, *self._nothing(prefix, asked), room, closed=False)
        return self.speaker.answer(prefix, *way.soft_tokens(prefix, asked), self.longest)

    def _is_right(self, way: Way, said: list[int], problem: Problem) -> bool:
        if way.soft_tokens is None:
            close = self.speaker.tags.close
            said = said[said.index(close) + 1 :] if close in said else []
        text = self.speaker.tokenizer.decode(said, skip_special_tokens=True)
        return problems.same_answer(text, problem.gold)

    @torch.no_grad()
    def read_out(self, thinker: LatentThinker) -> float:
        """The share of problems in whose last thought the head reads the answer's first token; nothing is injected."""
        right = 0
        for start in range(0, len(self.asked), BATCH):
            asked = self.asked[start : start + BATCH]
            prefix = self.speaker.prefill([self.prompts[problem.id] for problem in asked])
            thoughts, soft_mask = self.speaker.think(thinker, prefix)
            last = thoughts[torch.arange(len(thoughts), device=thoughts.device), soft_mask.sum(1) - 1]
            read_ids = read(self.speaker.decoder, thinker, last).argmax(-1).tolist()
            gold = [self.speaker.tokenizer(p.gold, add_special_tokens=False).input_ids[:1] for p in asked]
            right += sum([said] == first for said, first in zip(read_ids, gold, strict=True))
        return right / len(self.asked)


def _blank(record: dict[str, Any]) -> dict[str, Any]:
    """A record whose thought or answer is empty, filled with a token, so that it can be read as any other."""
    thought = record["thought_ids"] or record["prompt_ids"][-1:]
    return {**record, "thought_ids": thought, "answer_ids": record["answer_ids"] or thought[-1:]}


def print_ways(rows: list[Row], figures: dict[str, float]) -> None:
    """Print the table, 80 columns wide."""
    words = next(row for row in rows if row.name == "words")
    nothing = next(row for row in rows if row.name == "nothing")
    gap = words.accuracy.value - nothing.accuracy.value
    table = []
    for row in rows:
        low, high = row.accuracy.interval
        recovered = f"{(row.accuracy.value - nothing.accuracy.value) / gap:.2f}" if gap else ""
        timed = ["" if t is None else f"{1000 * t:.0f}" for t in (row.latency(0.5), row.latency(0.95))]
        interval = f"{100 * low:.1f}-{100 * high:.1f}"
        table.append(
            [
                row.name,
                f"{row.accuracy.value:.1%}",
                interval,
                f"{row.p_value:.1g}",
                recovered,
                f"{row.tokens:.1f}",
                *timed,
            ]
        )
    print_table(["thinking", "right", "95 %", "p", "recovered", "tokens", "p50 ms", "p95 ms"], table)
    print(
        f"\nthe head reads the answer in the last thought of {figures['readout']:.1%} of {figures['problems']} problems"
    )


def save_ways(rows: list[Row], figures: dict[str, float], out: Path) -> None:
    """Write `results.json` and `plots/thinking.png`."""
    values = {row.name: summary(row) for row in rows}
    write_json(out / RESULTS, {**figures, "ways": values})
    let_go(out)
    plot_ways(rows, out / "plots" / "thinking.png")
    print(f"\nwrote {out}/: results.json, plots/thinking.png")


def summary(row: Row) -> dict[str, Any]:
    """The figures of a way to think; latencies in seconds."""
    return {
        "accuracy": row.accuracy.value,
        "interval": row.accuracy.interval,
        "p_value": row.p_value,
        "tokens": row.tokens,
        "p50": row.latency(0.5),
        "p95": row.latency(0.95),
        "right": row.right,
    }


def plot_ways(rows: list[Row], path: Path) -> None:
    """Draw the accuracy of every way, with its interval, and its latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 0.5 + 0.45 * len(rows)), sharey=True)
    figure.set_layout_engine("constrained")
    names = [row.name for row in rows]
    values = [row.accuracy.value for row in rows]
    around = [[v - row.accuracy.interval[0], row.accuracy.interval[1] - v] for v, row in zip(values, rows, strict=True)]
    left.barh(names, values, xerr=[list(side) for side in zip(*around, strict=True)], color="C0", capsize=3)
    left.set_xlabel("share of right answers, 95 % interval")
    left.set_xlim(0, 1.02)
    left.invert_yaxis()
    right.barh(names, [1000 * (row.latency(0.5) or 0) for row in rows], color="C1")
    right.set_xlabel("median milliseconds per answer, one at a time")
    for axis in (left, right):
        axis.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)
