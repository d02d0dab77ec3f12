"""`wf serve`: serve models over the OpenAI interface. Packed folders are the fastest."""

import importlib
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import parse_bytes

log = logging.getLogger("wrinklefree")

EXTRA = ("starlette", "uvicorn")


EngineName = Literal["auto", "native", "transformers"]


@dataclass(frozen=True)
class _Options:
    """How models are opened."""

    engine: EngineName
    threads: int | None
    slots: int
    context: int
    half_cache: bool
    trust_remote_code: bool
    allow_special: bool


def run(
    paths: list[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_prompt_tokens: int = 4096,
    max_tokens: int = 2048,
    max_concurrent: int = 8,
    max_waiting: int = 64,
    max_memory: str | None = None,
    api_key: str | None = None,
    name: list[str] | None = None,
    engine: EngineName = "auto",
    threads: int | None = None,
    half_cache: bool = False,
    trust_remote_code: bool = False,
    allow_special: bool = False,
    cors: list[str] | None = None,
    page: bool = True,
) -> None:
    """Serve until SIGINT or SIGTERM. A single model is opened now, several when they are asked for.

    Raises UserError if the extra `serve` is not installed, a model cannot be loaded or is larger than `max_memory`, or
    the address cannot be used.
    """
    _check_extra()
    from wrinklefree.serve import server
    from wrinklefree.serve.access import LOOPBACK, Access
    from wrinklefree.serve.app import Service
    from wrinklefree.serve.models import Limits, Models
    from wrinklefree.tracking.terminal import show_log_lines

    show_log_lines()
    if host not in LOOPBACK and api_key is None:
        log.warning("--host %s without --api-key: anyone who can reach this address can use it", host)
    names, most = _names(paths, name or []), None if max_memory is None else parse_bytes("--max-memory", max_memory)
    with server.bind(host, port) as bound:
        context = max_prompt_tokens + max_tokens
        options = _Options(engine, threads, max_concurrent, context, half_cache, trust_remote_code, allow_special)
        offers = [_offer(name, path, options, most) for name, path in zip(names, paths, strict=True)]
        models = Models(offers, Limits(max_prompt_tokens, max_tokens), max_waiting, most)
        access = Access(api_key, tuple(cors or ()), LOOPBACK if host in LOOPBACK else None, page)
        if len(offers) == 1:
            models.start(offers[0])
        try:
            text = _announcement(models, server.url(bound), max_concurrent, max_waiting)
            server.run(Service(models, access), bound, lambda: log.info("%s", text))
        finally:
            models.close()


def _check_extra() -> None:
    """Raise UserError if the libraries of the extra `serve` are not installed."""
    try:
        importlib.import_module("wrinklefree.serve.server")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise UserError("wf serve needs two more libraries: pip install 'wrinklefree[serve]'") from None


def _names(paths: list[str], given: list[str]) -> list[str]:
    """The models' names. Raises UserError if there are too many of them, or two models have the same."""
    if len(given) > len(paths):
        raise UserError(f"--name {given[-1]}: {len(given)} names for {len(paths)} models")
    names = given + [model_name(path) for path in paths[len(given) :]]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two models are called {twice}: give one --name for each model, in their order")
    return names


def _offer(name: str, path: str, options: _Options, most: int | None) -> Any:
    """A model that can be opened. Raises UserError if it is not there, or takes more than `most` bytes."""
    from wrinklefree.generate.open import engine_for
    from wrinklefree.serve.memory import Need, needed
    from wrinklefree.serve.models import Offer
    from wrinklefree.tracking.terminal import short_size

    need = Need(0, 0)
    folder, reason = engine_for(path, options.engine, options.trust_remote_code)
    if most is not None:
        native, more = reason is None, (options.half_cache, options.trust_remote_code)
        need = needed(folder, native, options.slots, options.context, *more)
        if need.total > most:
            raise UserError(
                f"--max-memory: {name} takes {short_size(need.total)}, {short_size(need.weights)} for its weights and "
                f"{short_size(need.cache)} for keys and values of {options.slots} requests: allow more, or lower "
                "--max-concurrent, --max-prompt-tokens or --max-tokens"
            )
    return Offer(name, lambda: _open(name, path, options, need), need.total)


def _open(name: str, path: str, options: _Options, need: Any) -> Any:
    """Open a model. `need` is the memory that its files tell."""
    from wrinklefree.engine.engine import Engine
    from wrinklefree.generate.generate import context_of, turn_end
    from wrinklefree.generate.open import open_engine
    from wrinklefree.serve.fallback import TransformersEngine
    from wrinklefree.serve.models import Model, Opened

    o = options
    running, tokenizer, description = open_engine(
        path, o.engine, o.threads, o.slots, o.context, o.half_cache, o.trust_remote_code
    )
    stated = (running.generation if isinstance(running, Engine) else running.generation_config).eos_token_id
    ends = [tokenizer.eos_token_id, turn_end(tokenizer) if tokenizer.chat_template else None]
    ends += stated if isinstance(stated, list) else [stated]
    weights = need.weights
    if isinstance(running, Engine):
        weights = running.weight_bytes() + running.bytes()  # those of its buffers; its cache is still empty
    elif o.half_cache:
        raise UserError(f"--half-cache: works only with the native engine, and this is another ({description})")
    else:
        running = TransformersEngine(running, min(o.context, context_of(running)), o.slots)
        description += ", slow: one sequence after the other"
    known = frozenset(end for end in ends if end is not None)
    return Opened(Model(name, tokenizer, known, description, o.allow_special), running, weights + need.cache)


def model_name(path: str) -> str:
    """The name of the folder. For `packed/` and `final/` it is the name of their run."""
    folder = Path(path).resolve() if Path(path).exists() else Path(path)
    return folder.parent.name if folder.name in ("packed", "final") else folder.name


def _announcement(models: Any, url: str, slots: int, waiting: int) -> str:
    """The line that says what is served, where, and how to ask for it."""
    names, limits = list(models.offers), models.limits
    about = f"{len(names)} models, opened when they are asked for"
    if len(names) == 1:
        about, limits = models.engine(), models.running(names[0]).limits
    body = f'{{"model": "{names[0]}", "prompt": "def ", "max_tokens": 32}}'
    return (
        f"serving {', '.join(names)} at {url}/v1 ({about}; {slots} at once, {waiting} more may wait; prompts up to "
        f"{limits.prompt} tokens, answers up to {limits.answer}). Try: "
        f"curl {url}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    )
