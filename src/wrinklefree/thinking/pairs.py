"""Thoughts of a language model: written out first, then read back for their hidden states.

First the model writes a thought and an answer to each problem, with ordinary cached generation. The tokens are kept,
and a second, teacher-forced pass has the state of every position. (States gathered while generating lack the last one.)
Both passes can be interrupted: a problem with a thought is not given to the model again, and a whole shard is kept.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.thinking import PairsConfig
from wrinklefree.core.errors import UserError
from wrinklefree.data import problems
from wrinklefree.data.problems import Problem
from wrinklefree.data.sources import Split
from wrinklefree.distributed.world import World, barrier
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import hidden_pairs, tags
from wrinklefree.thinking.hidden_pairs import Pair
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.tracking.progress import Lines

log = logging.getLogger("wrinklefree")

Record = dict[str, Any]  # a line of thoughts-RANK.jsonl

UNCLOSED, WRONG, LONG, REPEATED = "no closing tag", "wrong answer", "thought too long", "repeated"


class Writer:
    """A language model that writes thoughts."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: PairsConfig) -> None:
        """Raises UserError if the model has no tags."""
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.tags = tags.find_tags(tokenizer)

    @torch.inference_mode()
    def write(self, split: Split, numbered: list[tuple[Problem, int]], seed: int) -> list[Record]:
        """A record for each (problem, number of its sample)."""
        prompts = [tags.prompt(self.tokenizer, problem.question) for problem, _ in numbered]
        ids, mask = (t.to(self.model.device) for t in tags.padded(prompts, tags.pad_id(self.tokenizer), "left"))
        hot = self.config.temperature > 0
        sampling = {"do_sample": True, "temperature": self.config.temperature} if hot else {"do_sample": False}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self.model.generate(
                ids,
                attention_mask=mask.long(),
                max_new_tokens=self.config.max_new_tokens,
                pad_token_id=tags.pad_id(self.tokenizer),
                **sampling,
            )
        written = out[:, ids.shape[1] :].tolist()
        return [
            {"split": split, "sample": sample, **self._record(problem, prompt, new)}
            for (problem, sample), prompt, new in zip(numbered, prompts, written, strict=True)
        ]

    def _record(self, problem: Problem, prompt: list[int], new: list[int]) -> Record:
        end = self.tokenizer.eos_token_id
        new = new[: new.index(end) + 1] if end in new else [i for i in new if i != tags.pad_id(self.tokenizer)]
        closed = self.tags.close in new
        cut = new.index(self.tags.close) if closed else len(new)
        answer = new[cut + 1 :]
        said = self.tokenizer.decode(answer, skip_special_tokens=True)
        return {
            "id": problem.id,
            "question": problem.question,
            "gold": problem.gold,
            "prompt_ids": prompt,
            "thought_ids": new[:cut],
            "answer_ids": answer,
            "closed": closed,
            "correct": closed and problems.same_answer(said, problem.gold),
            "text": self.tokenizer.decode([*prompt, *new], skip_special_tokens=False),
        }


def write_thoughts(writer: Writer, folder: Path, splits: dict[Split, list[Problem]], seed: int, world: World) -> None:
    """Append the missing thoughts to `thoughts-RANK.jsonl`, batch after batch."""
    done = {(r["split"], r["id"], r["sample"]) for r in read_thoughts(folder)}
    barrier(world)  # every process has read the thoughts before one writes more
    config = writer.config
    todo = [
        (split, problem, sample)
        for split, found in splits.items()
        for problem in dict.fromkeys(found)
        for sample in range(config.samples_per_problem if split == "train" else 1)
        if (split, problem.id, sample) not in done
    ]
    batches = [todo[i : i + config.batch_size] for i in range(0, len(todo), config.batch_size)][
        world.rank :: world.size
    ]
    lines = Lines(len(batches), unit="batch")
    with (folder / f"thoughts-{world.rank:03d}.jsonl").open("a", encoding="utf-8") as file:
        for number, batch in enumerate(batches, start=1):
            records: list[Record] = []
            for split in splits:
                numbered = [(problem, sample) for s, problem, sample in batch if s == split]
                if numbered:
                    records += writer.write(split, numbered, seed + len(done) + number * world.size + world.rank)
            file.write("".join(json.dumps(record) + "\n" for record in records))
            file.flush()
            if world.is_main:
                right = sum(record["correct"] for record in records) / len(records)
                lines.show(number, f"{right:.0%} of the last answers are right")
    barrier(world)


def read_thoughts(folder: Path) -> list[Record]:
    """All records. A last line that a crash cut short is removed, so that the next record begins a line."""
    records: list[Record] = []
    for path in sorted(folder.glob("thoughts-*.jsonl")):
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
    return records


def select(
    records: list[Record], config: PairsConfig, order: list[tuple[Split, str]]
) -> tuple[list[Record], Counter[str]]:
    """The records to keep, in the order of the problems, and how many were dropped for each reason."""
    place = {key: n for n, key in enumerate(order)}
    ordered = sorted(
        (r for r in records if (r["split"], r["id"]) in place), key=lambda r: (place[r["split"], r["id"]], r["sample"])
    )
    kept: list[Record] = []
    dropped: Counter[str] = Counter()
    seen: set[tuple[Any, ...]] = set()
    for record in ordered:
        why = _why_not(record, config, seen)
        if why is None:
            kept.append(record)
        else:
            dropped[why] += 1
    return kept, dropped


def _why_not(record: Record, config: PairsConfig, seen: set[tuple[Any, ...]]) -> str | None:
    """The reason to drop a record, or None."""
    if not record["closed"] or not record["answer_ids"] or not record["thought_ids"]:
        return UNCLOSED
    if not record["correct"] and not config.keep_wrong:
        return WRONG
    if len(record["thought_ids"]) > config.max_thought_tokens:
        return LONG
    key = (record["id"], *record["thought_ids"])
    if key in seen:
        return REPEATED
    seen.add(key)
    return None


class Reader:
    """A language model that reads thoughts back, and the compressor for its states."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        thinker: LatentThinker,
        config: PairsConfig,
    ) -> None:
        self.decoder, self.tokenizer, self.thinker, self.config = BodyAndHead(model), tokenizer, thinker, config
        self.tags, self.device = tags.find_tags(tokenizer), model.device

    @torch.no_grad()
    def read(self, records: list[Record]) -> list[Pair]:
        """The pairs of these records, from one forward pass."""
        rows = [[*r["prompt_ids"], *r["thought_ids"], self.tags.close, *r["answer_ids"]] for r in records]
        ids, _ = tags.padded(rows, tags.pad_id(self.tokenizer))  # padding on the right: no token sees it
        states = self.decoder.states({"input_ids": ids.to(self.device)})
        codes = self.thinker.compressor.compress(states).cpu()
        return [self._pair(record, row, code) for record, row, code in zip(records, rows, codes, strict=True)]

    def _pair(self, record: Record, row: list[int], codes: Tensor) -> Pair:
        prompt = len(record["prompt_ids"])
        places = torch.tensor(self.places(record))
        return Pair(
            torch.tensor(record["prompt_ids"]),
            torch.tensor(record["thought_ids"]),
            torch.tensor(record["answer_ids"]),
            codes[:prompt].clone(),
            codes[places],
            torch.tensor(row)[places + 1],
        )

    def places(self, record: Record) -> list[int]:
        """For each segment the position that predicts its last token; for the last one, the answer's first token.

        There are at most `max_thoughts`, evenly over the thought.
        """
        prompt, thought = len(record["prompt_ids"]), record["thought_ids"]
        ends = [prompt + end - 1 for end in self._segment_ends(thought)]
        blank = next((i for i, token in enumerate(record["answer_ids"]) if self.tokenizer.decode([token]).strip()), 0)
        ends[-1] = prompt + len(thought) + blank  # of </think>, or of the blank tokens that follow it
        most = self.thinker.config.max_thoughts
        return ends if len(ends) <= most else [ends[(i + 1) * len(ends) // most - 1] for i in range(most)]

    def _segment_ends(self, thought: list[int]) -> list[int]:
        """The index of the last token of each segment; there is at least one."""
        if self.config.segments == "tokens":
            size = self.config.segment_tokens
            return [min(start + size, len(thought)) - 1 for start in range(0, len(thought), size)]
        breaks = [i for i, token in enumerate(thought) if "\n" in self.tokenizer.decode([token])]
        ends = [i - 1 for i in breaks if i > 0 and i - 1 not in breaks]
        return [*(end for end in ends if end < len(thought) - 1), len(thought) - 1]


def write_shards(reader: Reader, folder: Path, split: Split, kept: list[Record], key: str, world: World) -> None:
    """Write the shards of a split that are missing, and that are this process's to write."""
    size, batch = reader.config.shard_size, reader.config.batch_size
    shards = [kept[i : i + size] for i in range(0, len(kept), size)]
    for number, records in islice(enumerate(shards), world.rank, None, world.size):
        path = hidden_pairs.shard_path(folder, split, number)
        if not hidden_pairs.is_whole(path, key):
            hidden_pairs.write_shard(path, list(_read_all(reader, records, batch)), key)


def _read_all(reader: Reader, records: list[Record], batch: int) -> Iterator[Pair]:
    for start in range(0, len(records), batch):
        yield from reader.read(records[start : start + batch])
