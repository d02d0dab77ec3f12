"""Measure `wf serve` with several streams: tokens per second of all streams together, compared with a single stream.

    python -m benchmarks.serving [FOLDER] [--count 8] [--length 128] [--rounds 3] [--threads N] [--json]

Without FOLDER, it serves a ternary Llama with 1.1 B random parameters and an int8 head. The client only reads bytes and
parses nothing, so that it takes little of the server's time on a machine with few cores.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.shapes import SHAPES, llama_config
from wrinklefree.core.method import QuantMethod, find
from wrinklefree.export.formats.packed import pack_model
from wrinklefree.export.rounded import head
from wrinklefree.models.find import resolve_pretrained
from wrinklefree.models.load import open_tokenizer

PROMPT = "def"


def streams(
    folder: Path, count: int = 8, length: int = 128, rounds: int = 3, threads: int | None = None
) -> dict[str, float]:
    """Tokens per second of one stream and of `count` streams at the same time: medians of alternating rounds."""
    options = ["--max-concurrent", str(count), "--name", "bench", "--engine", "native"]
    options += [] if threads is None else ["--threads", str(threads)]
    with served(folder, *options) as (host, port):
        asyncio.run(together(host, port, count, 4))  # warm-up
        pairs = [[asyncio.run(together(host, port, n, length)) for n in (1, count)] for _ in range(rounds)]
    one, many = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    return {"one": one, "many": many, "ratio": ratio, "count": count}


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Run `wf serve` on a free port of this machine. Yields host and port."""
    command = [sys.executable, "-m", "wrinklefree.cli", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        address = re.search(r"at http://(\S+):(\d+)/v1", line)
        if not address:
            raise SystemExit(line + process.stderr.read())
        yield address[1], int(address[2])
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


async def together(host: str, port: int, count: int, length: int) -> float:
    """Tokens per second of `count` streams, from the first request to the last token."""
    start = time.perf_counter()
    tokens = await asyncio.gather(*(one(host, port, length, f"{i} {PROMPT}") for i in range(count)))
    return sum(tokens) / (time.perf_counter() - start)


async def one(host: str, port: int, length: int, prompt: str) -> int:
    """Read one stream to its end, and return the number of tokens."""
    values: dict[str, Any] = {"model": "bench", "prompt": prompt, "max_tokens": length, "temperature": 0}
    body = json.dumps(values | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head_lines = (
        *(b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Connection: close"),
        *(b"Content-Type: application/json", b"Content-Length: %d" % len(body)),
    )
    writer.write(b"\r\n".join([*head_lines, b"", body]))
    answer = (await reader.read(-1)).decode()
    writer.close()
    return int(re.findall(r'"completion_tokens":(\d+)', answer)[-1])


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
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of each stream")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or random_folder(Path(scratch) / "packed", args.shape)
        figures = streams(folder, args.count, args.length, args.rounds, args.threads)
    if args.json:
        print(json.dumps(figures))
    else:
        print("one stream {one:.1f} tokens/s, {count} streams {many:.1f}, ratio {ratio:.2f}".format(**figures))


if __name__ == "__main__":
    main()
