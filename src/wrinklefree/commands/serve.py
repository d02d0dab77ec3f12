"""`wf serve`: serve a model over the OpenAI interface. Packed folders are the fastest."""

import importlib
import logging
import shlex
from pathlib import Path
from typing import Any, Literal

from wrinklefree.core.errors import UserError

log = logging.getLogger("wrinklefree")

EXTRA = ("starlette", "uvicorn")


def run(
    path: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_prompt_tokens: int = 4096,
    max_tokens: int = 2048,
    max_concurrent: int = 8,
    max_waiting: int = 64,
    api_key: str | None = None,
    name: str | None = None,
    engine: Literal["auto", "native", "transformers"] = "auto",
    threads: int | None = None,
    half_cache: bool = False,
    trust_remote_code: bool = False,
    allow_special: bool = False,
    cors: list[str] | None = None,
    page: bool = True,
) -> None:
    """Serve until SIGINT or SIGTERM.

    Raises UserError if the extra `serve` is not installed, the model cannot be loaded, or the address cannot be used.
    """
    _check_extra()
    from wrinklefree.serve import server
    from wrinklefree.serve.access import LOOPBACK, Access
    from wrinklefree.serve.app import Limits, Model, Service
    from wrinklefree.serve.scheduler import Scheduler
    from wrinklefree.tracking.terminal import show_log_lines

    show_log_lines()
    if host not in LOOPBACK and api_key is None:
        log.warning("--host %s without --api-key: anyone who can reach this address can use it", host)
    with server.bind(host, port) as bound:
        context = max_prompt_tokens + max_tokens
        running, tokenizer, description, ends = _open(
            path, engine, threads, max_concurrent, context, half_cache, trust_remote_code
        )
        limits = Limits(min(max_prompt_tokens, running.context - 1), min(max_tokens, running.context - 1))
        model = Model(name or model_name(path), tokenizer, ends, description, allow_special)
        access = Access(api_key, tuple(cors or ()), LOOPBACK if host in LOOPBACK else None, page)
        service = Service(model, Scheduler(running, max_waiting), limits, access)
        sizes = f"prompts up to {limits.prompt} tokens, answers up to {limits.answer}"
        text = (
            f"serving {model.name} at {server.url(bound)}/v1 ({description}; {max_concurrent} at once, "
            f"{max_waiting} more may wait; {sizes}). Try: {_example(bound, service)}"
        )
        server.run(service, bound, lambda: log.info("%s", text))


def _check_extra() -> None:
    """Raise UserError if the libraries of the extra `serve` are not installed."""
    try:
        importlib.import_module("wrinklefree.serve.server")
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        raise UserError("wf serve needs two more libraries: pip install 'wrinklefree[serve]'") from None


def _open(
    path: str,
    choice: Literal["auto", "native", "transformers"],
    threads: int | None,
    slots: int,
    context: int,
    half_cache: bool,
    trust_remote_code: bool,
) -> tuple[Any, Any, str, frozenset[int]]:
    """Open the engine. Returns it with its tokenizer, a description, and the tokens that end an answer."""
    from wrinklefree.engine.engine import Engine
    from wrinklefree.generate.generate import context_of, turn_end
    from wrinklefree.generate.open import open_engine
    from wrinklefree.serve.fallback import TransformersEngine

    model, tokenizer, description = open_engine(path, choice, threads, slots, context, half_cache, trust_remote_code)
    stated = (model.generation if isinstance(model, Engine) else model.generation_config).eos_token_id
    ends = [tokenizer.eos_token_id, turn_end(tokenizer) if tokenizer.chat_template else None]
    ends += stated if isinstance(stated, list) else [stated]
    if not isinstance(model, Engine):
        if half_cache:
            raise UserError(f"--half-cache: works only with the native engine, and this is another ({description})")
        model = TransformersEngine(model, min(context, context_of(model)), slots)
        description += ", slow: one sequence after the other"
    return model, tokenizer, description, frozenset(end for end in ends if end is not None)


def model_name(path: str) -> str:
    """The name of the folder. For `packed/` and `final/` it is the name of their run."""
    folder = Path(path).resolve() if Path(path).exists() else Path(path)
    return folder.parent.name if folder.name in ("packed", "final") else folder.name


def _example(bound: Any, service: Any) -> str:
    """A curl command that asks this server for a completion."""
    from wrinklefree.serve.server import url

    body = f'{{"model": "{service.model.name}", "prompt": "def ", "max_tokens": 32}}'
    return f"curl {url(bound)}/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
