"""`wf serve` in a process of its own, and ways to ask it."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from openai import OpenAI

PROMPT = "def main(arguments):\n"
LONGEST = 128  # tokens of prompts, and of answers


@dataclass
class Process:
    """`wf serve` and its address."""

    popen: subprocess.Popen[str]
    url: str
    announced: str

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def health(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/health").json()

    def is_idle(self) -> bool:
        health = self.health()
        return health["open"] == health["waiting"] == 0

    def end(self, number: int) -> tuple[int, str]:
        """Exit code, and what it said last."""
        self.popen.send_signal(number)
        assert self.popen.stderr is not None
        return self.popen.wait(timeout=15), self.popen.stderr.read()


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "wrinklefree.cli", "serve", str(folder), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    popen = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert popen.stderr is not None
        line = popen.stderr.readline()
        found = re.search(r"at (http://\S+)/v1 ", line)
        assert found, line + popen.stderr.read()
        yield Process(popen, found[1], line)
    finally:
        popen.kill()
        popen.wait()
        popen.stderr.close()


def said(client: OpenAI, prompt: Any = PROMPT, **options: Any) -> str:
    options = {"temperature": 0, "max_tokens": 40} | options
    return client.completions.create(model="toy", prompt=prompt, **options).choices[0].text


def streamed(client: OpenAI, **options: Any) -> tuple[str, str | None, Any]:
    """Text, why it ended, and usage."""
    options = {"temperature": 0, "max_tokens": 40, "prompt": PROMPT} | options
    pieces, finish, usage = [], None, None
    with client.completions.create(model="toy", stream=True, **options) as chunks:
        for chunk in chunks:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                pieces.append(choice.text)
                finish = choice.finish_reason or finish
    return "".join(pieces), finish, usage


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
