"""Measure `wf serve` under load: many streams, long prompts between them, shared prefixes, clients that go away.

    python -m benchmarks.serving [FOLDER] [--length 128] [--rounds 3] [--threads N] [--soak SECONDS] [--json]

| figure | what it is |
|---|---|
| `streams_8_over_1`, `streams_16_over_1` | tokens per second of so many streams over those of one |
| `p95_over_median_mixed` | of the times from token to token, while long prompts come and half of their clients go |
| `second_prompt_over_first` | times to the first token, for the same system prompt |
| `structured_over_plain` | time from token to token of an answer by a JSON schema, over that of plain text |
| `structured_short_over_plain` | the same if the schema's texts have at most 12 characters (`maxLength`) |
| `soak_*` | `--soak`: requests of all kinds, half of them aborted; memory of the server before and after |

Without FOLDER, it serves a ternary Llama with 1.1 B random parameters and an int8 head. The client is a process of its
own and hardly parses what it reads, so that it takes little of the server's time on a machine with few cores.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.shapes import SHAPES, llama_config
from wrinklefree.core.method import QuantMethod, find
from wrinklefree.export.formats.packed import pack_model
from wrinklefree.export.rounded import head
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_config, open_tokenizer

PROMPT = "def"
TALKING, LONG, SHORT = 4, 1000, 20  # streams beside long prompts; tokens of a long prompt and of a short one
SHARED = 800  # tokens of a system prompt
VOCAB = (100, 20_000)  # random prompts are made of these token ids


@dataclass(frozen=True)
class Server:
    """A running server."""

    host: str
    port: int
    pid: int
    ends: tuple[int, ...]  # token ids that end an answer: with a bias, so that all answers have their full length

    async def events(self, prompt: str | list[int], length: int, **more: Any) -> AsyncIterator[bytes]:
        """The events of one streamed completion, as they come. Whoever leaves early closes the connection."""
        values: dict[str, Any] = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": length,
            "temperature": 0,
            "stream": True,
        }
        values |= {"stream_options": {"include_usage": True}, "logit_bias": {str(end): -100 for end in self.ends}}
        values |= more
        body = json.dumps(values).encode()
        lines = (b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Connection: close")
        about = (b"Content-Type: application/json", b"Content-Length: %d" % len(body))
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**20)
        try:
            writer.write(b"\r\n".join([*lines, *about, b"", body]))
            if b" 200 " not in (status := await reader.readline()):
                raise SystemExit(f"{status.decode()}{(await reader.read(-1)).decode()}")
            while not (event := await reader.readuntil(b"\n\n")).endswith(b"[DONE]\n\n"):
                yield event
        finally:
            writer.close()

    async def times(self, prompt: str | list[int], length: int) -> list[float]:
        """When each piece of one answer came. Almost every token is a piece."""
        return [time.perf_counter() async for event in self.events(prompt, length) if b'"text":"' in event]

    async def tokens(self, prompt: str | list[int], length: int) -> int:
        """How many tokens one answer has."""
        last = b""
        async for event in self.events(prompt, length):
            last = event
        return _tokens_of(last)

    async def first(self, prompt: str | list[int], **more: Any) -> float:
        """Seconds to the first token of an answer."""
        start = time.perf_counter()
        await anext(self.events(prompt, 1, **more))
        return time.perf_counter() - start

    async def pace(self, prompt: str | list[int], length: int, **more: Any) -> float:
        """Seconds from token to token of one answer, without those to the first."""
        times, last = [], b""
        async for event in self.events(prompt, length, **more):
            times.append(time.perf_counter())
            last = event
        return (times[-1] - times[0]) / (_tokens_of(last) - 1)

    def memory(self) -> float:
        """Memory that the process holds, in MB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1000


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Server]:
    """Run `wf serve` on a free port of this machine."""
    command = [sys.executable, "-m", "wrinklefree.cli", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"at http://(\S+):(\d+)/v1", line)
        if not address:
            raise SystemExit(line + process.stderr.read())
        yield Server(address[1], int(address[2]), process.pid, _ends(folder))
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def _tokens_of(event: bytes) -> int:
    """How many tokens an answer has, by its last event."""
    return int(re.findall(rb'"completion_tokens":(\d+)', event)[-1])


def _ends(folder: Path) -> tuple[int, ...]:
    stated = open_config(str(folder)).get_text_config().eos_token_id
    ends = stated if isinstance(stated, list) else [stated]
    ends.append(open_tokenizer(str(folder)).eos_token_id)
    return tuple({end for end in ends if end is not None})


def native(threads: int | None, slots: int) -> list[str]:
    """The options of a server for measurements."""
    options = ["--max-concurrent", str(slots), "--name", "bench", "--engine", "native"]
    return options + ([] if threads is None else ["--threads", str(threads)])


def streams(
    folder: Path, count: int = 8, length: int = 128, rounds: int = 3, threads: int | None = None
) -> dict[str, float]:
    """Tokens per second of one stream and of `count` streams at the same time: medians of alternating rounds."""
    with served(folder, *native(threads, count)) as server:
        one, many = compare(server, (1, count), length, rounds)
    return {"one": one[0], "many": many[0], "ratio": many[1], "count": count}


def compare(server: Server, counts: Sequence[int], length: int, rounds: int) -> list[tuple[float, float]]:
    """For each count of streams: tokens per second, and over those of the first count. Medians of rounds in turns."""
    asyncio.run(together(server, counts[-1], 4))  # warm-up
    rows = [[asyncio.run(together(server, n, length)) for n in counts] for _ in range(rounds)]
    columns = list(zip(*rows, strict=True))
    return [
        (statistics.median(column), statistics.median(a / b for a, b in zip(column, columns[0], strict=True)))
        for column in columns
    ]


async def together(server: Server, count: int, length: int) -> float:
    """Tokens per second of `count` streams, from the first request to the last token."""
    start = time.perf_counter()
    tokens = await asyncio.gather(*(server.tokens(f"{i} {PROMPT}", length) for i in range(count)))
    return sum(tokens) / (time.perf_counter() - start)


async def mixed(server: Server, length: int, draw: random.Random) -> dict[str, float]:
    """Times from token to token of streams, while long prompts are read, half of whose clients leave."""
    alone = await asyncio.gather(*(server.times(words(draw, SHORT), length) for _ in range(TALKING)))
    others = asyncio.ensure_future(long_prompts(server, draw))
    beside = await asyncio.gather(*(server.times(words(draw, SHORT), length) for _ in range(TALKING)))
    others.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await others
    gaps, quiet = steps(beside), steps(alone)
    p95, median = statistics.quantiles(gaps, n=20)[-1], statistics.median(gaps)
    return {
        "p95_over_median_mixed": p95 / median,
        "p95_ms_mixed": 1000 * p95,
        "median_ms_mixed": 1000 * median,
        "p95_over_median_alone": statistics.quantiles(quiet, n=20)[-1] / statistics.median(quiet),
        "median_ms_alone": 1000 * statistics.median(quiet),
    }


async def long_prompts(server: Server, draw: random.Random) -> None:
    """One long prompt after the other, with a pause between them. Every second client leaves while it is read."""
    while True:
        answer = server.tokens(words(draw, LONG), 4)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(answer, draw.choice((0.1, None)))
        await asyncio.sleep(draw.uniform(0, 0.5))


def steps(answers: Sequence[Sequence[float]]) -> list[float]:
    """Seconds from piece to piece."""
    return [after - before for times in answers for before, after in itertools.pairwise(times)]


async def prefixes(server: Server, rounds: int, draw: random.Random) -> dict[str, float]:
    """Time to the first token of the second request with a system prompt, over that of the first."""
    pairs = []
    for _ in range(rounds):
        system = words(draw, SHARED)
        pairs.append([await server.first(system + words(draw, SHORT)) for _ in range(2)])
    return {
        "second_prompt_over_first": statistics.median(second / first for first, second in pairs),
        "first_prompt_ms": 1000 * statistics.median(first for first, _ in pairs),
    }


async def structured(server: Server, length: int, rounds: int) -> dict[str, float]:
    """Time from token to token of answers by JSON schemas, and over that of plain text: medians of rounds in turns."""
    await server.tokens(PROMPT, 4)
    figures = {"structured_first_ms": 1000 * await server.first(PROMPT, response_format=form({}))}
    forms: list[dict[str, Any]] = [{}, {"response_format": form({})}, {"response_format": form({"maxLength": 12})}]
    rows = [[await server.pace(PROMPT, length, **more) for more in forms] for _ in range(rounds)]
    for name, column in (("structured", 1), ("structured_short", 2)):
        figures[f"{name}_over_plain"] = statistics.median(row[column] / row[0] for row in rows)
        figures[f"{name}_us_more"] = 1e6 * statistics.median(row[column] - row[0] for row in rows)
    return figures | {"plain_us": 1e6 * statistics.median(row[0] for row in rows)}


def form(limits: dict[str, int]) -> dict[str, Any]:
    """The format of an answer that is longer than any measurement. Its texts have `limits`."""
    name, kind = {"type": "string", **limits}, {"enum": ["small", "large"]}
    properties = {"name": name, "kind": kind, "count": {"type": "integer", "minimum": 0, "maximum": 999}}
    item = {"type": "object", "properties": properties, "required": [*properties]}
    schema = {"type": "array", "minItems": 10_000, "items": item}
    return {"type": "json_schema", "json_schema": {"name": "list", "schema": schema}}


async def soak(server: Server, seconds: float, draw: random.Random) -> dict[str, float]:
    """Requests of all kinds for some time, half of them aborted. Memory before it, in the middle and after it.

    Before it each slot gets a text of the greatest length, because slots keep their memory.
    """
    ends: list[bool] = []
    await asyncio.gather(*(server.tokens(words(draw, LONG // 4), 64) for _ in range(16)))
    before = server.memory()
    workers = [asyncio.ensure_future(keep_asking(server, draw, ends)) for _ in range(12)]
    await asyncio.sleep(seconds / 2)
    middle = server.memory()
    await asyncio.sleep(seconds / 2)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    counts = {"soak_seconds": seconds, "soak_requests": len(ends), "soak_aborted": ends.count(False)}
    return counts | {"soak_before_mb": before, "soak_middle_mb": middle, "soak_after_mb": server.memory()}


async def keep_asking(server: Server, draw: random.Random, ends: list[bool]) -> None:
    """One request after the other; half of them are given up after up to a second. Notes which ended by themselves."""
    while True:
        answer = server.tokens(words(draw, draw.choice((1, SHORT, LONG // 4))), draw.randint(1, 64))
        try:
            await asyncio.wait_for(answer, draw.choice((draw.uniform(0, 1), None)))
            ends.append(True)
        except asyncio.TimeoutError:
            ends.append(False)


def words(draw: random.Random, count: int) -> list[int]:
    """A prompt of random tokens."""
    return [draw.randrange(*VOCAB) for _ in range(count)]


def measure(folder: Path, length: int, rounds: int, threads: int | None, soak_seconds: float) -> dict[str, float]:
    """All figures of one model."""
    draw = random.Random(0)
    with served(folder, *native(threads, 16)) as server:
        one, eight, sixteen = compare(server, (1, 8, 16), length, rounds)
        figures = {"streams_8_over_1": eight[1], "streams_16_over_1": sixteen[1]}
        figures |= {"tokens_per_s_1": one[0], "tokens_per_s_8": eight[0], "tokens_per_s_16": sixteen[0]}
        figures |= asyncio.run(mixed(server, 2 * length, draw))
        figures |= asyncio.run(prefixes(server, 2 * rounds + 1, draw))
        figures |= asyncio.run(structured(server, length, 2 * rounds + 1))
        if soak_seconds:
            figures |= asyncio.run(soak(server, soak_seconds, draw))
    return figures


def random_folder(out: Path, shape: str = "llama_1b") -> Path:
    """Write a packed ternary Llama with random weights. Its tokenizer is the embedded one with tokens added."""
    sizes = SHAPES[shape]
    config = llama_config(sizes, eos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    method = find("bitdistill")(name="bitdistill")
    assert isinstance(method, QuantMethod)
    student = method.prepare(model)
    packed = pack_model(student, method, "bfloat16", head.quantize(student, 8))
    words = open_tokenizer(resolve_pretrained("builtin:tiny"))
    words.add_tokens([f" {i}" for i in range(len(words), sizes.vocab)])
    packed.save_pretrained(out)
    words.save_pretrained(out)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, default="llama_1b", help="shape of the random model")
    parser.add_argument("--length", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--soak", type=float, default=0, metavar="SECONDS", help="a load of all kinds for so long")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or random_folder(Path(scratch) / "packed", args.shape)
        figures = measure(folder, args.length, args.rounds, args.threads, args.soak)
    if args.json:
        print(json.dumps(figures))
    else:
        print("\n".join(f"{name:24} {value:10.2f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
