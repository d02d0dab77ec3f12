"""What is measured of every model in `benchmarks/real`: perplexity, distance to the original, bytes, samples of text.

A model is a function from token ids [length] to logits [length, words]: a transformers model, or llama.cpp in another
process. So all are measured by the same code, and draw the same random numbers when they write.

ppl   exp of the mean cross entropy of the test's windows, each alone, over all its next-token predictions
kl    mean KL(original || model) in nats per predicted token, on text that the original wrote
top1  the share of these tokens for which both have the same likeliest word
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.core import surgery
from wrinklefree.core.errors import UserError

Logits = Callable[[Tensor], Tensor]  # token ids [length] -> logits fp32 [length, words]

TEST_TOKENS, WINDOW = 8192, 512  # as in shared/spec/real-models.md
LARGEST_NLL = 700.0  # exp of more is no finite number

PROMPTS = ("The capital of France is", "Once upon a time, there was a", "Water is made of")
SAMPLE_TOKENS, TEMPERATURE = 32, 0.7


@dataclass(frozen=True)
class Test:
    """What every model is measured on."""

    windows: list[Tensor]  # token ids of held-out text
    written: list[Tensor]  # token ids of what the original wrote, one document each
    original: Logits
    tokenizer: Any


@dataclass(frozen=True)
class Quality:
    """The figures of one model."""

    ppl: float
    kl: float
    top1: float
    sample: dict[str, list[str]]  # prompt -> greedy and sampled text


def split(ids: Tensor, tokens: int = TEST_TOKENS, window: int = WINDOW) -> tuple[list[Tensor], Tensor]:
    """Return the test's windows and the rest, which may be trained on. Raises UserError if the text is too short."""
    if len(ids) < 2 * tokens:
        raise UserError(f"--text: {len(ids):,} tokens; the test alone needs {tokens:,}, and calibration as many again")
    return list(ids[:tokens].split(window)), ids[tokens:]


def calibration(rest: Tensor, rows: int, length: int) -> Tensor:
    """Sequences [rows, length], evenly spaced in the text that is no test. Raises UserError if they do not fit."""
    stride = len(rest) // rows
    if stride < length:
        raise UserError(f"--rows {rows} --length {length}: the text has {len(rest):,} tokens to calibrate on")
    return torch.stack([rest[i * stride : i * stride + length] for i in range(rows)])


def documents(file: Path, tokenizer: Any, tokens: int = TEST_TOKENS, window: int = WINDOW) -> list[Tensor]:
    """Token ids of the texts in a jsonl file, at most `window` of each, until `tokens` are predicted.

    A row has `text`, or `messages` of a conversation. Raises UserError if the file has fewer tokens.
    """
    found, predicted = [], 0
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["text"] if "text" in row else tokenizer.apply_chat_template(row["messages"], tokenize=False)
        ids = tokenizer(text, return_tensors="pt").input_ids[0]
        ids = ids[: min(window, tokens - predicted + 1)]
        if len(ids) > 1:
            found.append(ids)
            predicted += len(ids) - 1
        if predicted == tokens:
            return found
    raise UserError(f"{file}: {predicted:,} tokens to predict, {tokens:,} are needed")


@torch.no_grad()
def write_documents(model: Any, tokenizer: Any, file: Path, tokens: int = TEST_TOKENS, seed: int = 0) -> None:
    """Let `model` write texts from its first token on, until the file has a quarter more than `tokens`."""
    torch.manual_seed(seed)
    start = torch.full((24, 1), model.config.bos_token_id)
    options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": WINDOW - 1}
    texts, written = [], 0
    while written < 1.25 * tokens:  # text may come back as fewer tokens than it was written with
        for row in model.generate(start, attention_mask=torch.ones_like(start), pad_token_id=0, **options):
            ended = (row[1:] == model.config.eos_token_id).nonzero()
            ids = row[: int(ended[0]) + 2] if len(ended) else row
            texts.append(tokenizer.decode(ids))
            written += len(ids)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def of_model(model: Any) -> Logits:
    """The logits of a transformers model."""

    @torch.no_grad()
    def logits(ids: Tensor) -> Tensor:
        out: Tensor = model(ids.unsqueeze(0), use_cache=False).logits[0]
        return out.float()

    return logits


def remembered(logits: Logits) -> Logits:
    """Compute the logits of a text once. Those of all the texts need 1.6 GB with 49,152 words."""
    known: dict[tuple[int, ...], Tensor] = {}

    def look_up(ids: Tensor) -> Tensor:
        key = tuple(ids.tolist())
        if key not in known:
            known[key] = logits(ids)
        return known[key]

    return look_up


def perplexity(logits: Logits, windows: Iterable[Tensor]) -> float:
    """Perplexity over all next-token predictions of the windows; infinite beyond the range of numbers."""
    total, count = 0.0, 0
    for ids in windows:
        total += F.cross_entropy(logits(ids)[:-1], ids[1:], reduction="sum").item()
        count += len(ids) - 1
    return math.exp(total / count) if total / count < LARGEST_NLL else math.inf


def distance(logits: Logits, original: Logits, texts: Iterable[Tensor]) -> tuple[float, float]:
    """Mean KL(original || model) and the share of equal likeliest words, over the predicted tokens of the texts."""
    kl, same, count = 0.0, 0, 0
    for ids in texts:
        ours, theirs = logits(ids)[:-1], original(ids)[:-1]
        kl += F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True).item()
        same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        count += len(ids) - 1
    return kl / count, same / count


def continued(logits: Logits, tokenizer: Any, prompt: str, temperature: float, seed: int = 0) -> str:
    """The next `SAMPLE_TOKENS` of a text. Temperature 0 takes the likeliest word each time."""
    random = torch.Generator().manual_seed(seed)
    ids = start = tokenizer(prompt, return_tensors="pt").input_ids[0]
    for _ in range(SAMPLE_TOKENS):
        last = logits(ids)[-1]
        new = last.argmax().view(1)
        if temperature:
            new = torch.multinomial((last / temperature).softmax(-1), 1, generator=random)
        ids = torch.cat([ids, new])
    return str(tokenizer.decode(ids[len(start) :]))


def measure(logits: Logits, test: Test) -> Quality:
    """All figures of one model."""
    ppl = perplexity(logits, test.windows)
    kl, top1 = distance(logits, test.original, test.written)
    temperatures = (0.0, TEMPERATURE)
    sample = {p: [continued(logits, test.tokenizer, p, t) for t in temperatures] for p in PROMPTS}
    return Quality(ppl, kl, top1, sample)


def block_linears(model: Any) -> dict[str, Any]:
    """The linear layers of the blocks by fqn: all but embedding and head."""
    return dict(surgery.linears(model, ["embed_tokens", "lm_head"]))
