"""mod7_chains: arithmetic that a small model solves step by step, but not at a glance.

A question is a number below 7 and up to six operations, applied from left to right modulo 7:

    3 +2 *4 ?  <think> +2 5 *4 6 </think> 6         with a thought: each operation and its result
    3 +2 *4 ?  <think> </think> 6                   without one

Every word is one token (25 in all), so a step is one look-up in a table of 77 entries. A hash decides whether a
question is for training or test.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from wrinklefree.data.sources import Example, Split

NAME = "mod7_chains"
MODULUS = 7
LONGEST = 6  # operations
OPERATIONS = tuple(f"+{n}" for n in range(1, MODULUS)) + tuple(f"*{n}" for n in range(2, MODULUS))
BOS, EOS, PAD, THINK, END_THINK = "<bos>", "<eos>", "<pad>", "<think>", "</think>"
HELDOUT_EVERY = 8  # of the questions with at least two operations

NUM_TRAINING = 100_000  # documents of an epoch
NUM_HELDOUT = 2_000
THOUGHT_SHARE = 0.8  # of documents that show the thought; at 0.6 a greedy model sometimes leaves it out


class Chain(NamedTuple):
    """A start value and the operations on it."""

    start: int
    operations: tuple[str, ...]

    @property
    def question(self) -> str:
        """Such as `3 +2 *4 ?`."""
        return " ".join([str(self.start), *self.operations, "?"])

    @property
    def results(self) -> list[int]:
        """The value after each operation."""
        values = [self.start]
        for operation in self.operations:
            number = int(operation[1:])
            values.append((values[-1] + number if operation[0] == "+" else values[-1] * number) % MODULUS)
        return values[1:]

    @property
    def thought(self) -> str:
        """Each operation and its result, such as `+2 5 *4 6`."""
        return " ".join(f"{operation} {value}" for operation, value in zip(self.operations, self.results, strict=True))

    @property
    def answer(self) -> str:
        return str(self.results[-1])


def draw(generator: random.Random, split: Split) -> Chain:
    """Draw a random chain of a split. Every length is equally likely."""
    length = generator.randint(1, LONGEST)
    while True:
        chain = Chain(generator.randrange(MODULUS), tuple(generator.choice(OPERATIONS) for _ in range(length)))
        # There are only 77 chains of one operation, too few to split: both splits have them all.
        if length == 1 or _is_heldout(chain) == (split == "heldout"):
            return chain


def _is_heldout(chain: Chain) -> bool:
    return hashlib.sha256(chain.question.encode()).digest()[0] % HELDOUT_EVERY == 0


def chains(split: Split, count: int, seed: int = 0) -> Iterator[Chain]:
    """Yield `count` chains, the same ones at every call. Short chains repeat."""
    generator = random.Random(f"{NAME} {split} {seed}")
    for _ in range(count):
        yield draw(generator, split)


@cache
def examples(split: Split) -> tuple[Example, ...]:
    """Return documents to train and evaluate a language model on. Only what follows `<think>` is learned."""
    generator = random.Random(f"{NAME} thoughts {split}")
    count = NUM_TRAINING if split == "train" else NUM_HELDOUT
    return tuple(_example(chain, generator.random() < THOUGHT_SHARE) for chain in chains(split, count))


def _example(chain: Chain, thinks: bool) -> Example:
    thought = f" {chain.thought}" if thinks else ""
    return Example(f"{chain.question} {THINK}", f"{thought} {END_THINK} {chain.answer}")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word. It puts `<bos>` before every text."""
    words = [PAD, BOS, EOS, THINK, END_THINK, "?", *map(str, range(MODULUS)), *OPERATIONS]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words.index(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[THINK, END_THINK],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
