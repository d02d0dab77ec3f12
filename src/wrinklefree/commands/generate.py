"""`wf generate`: generate text with a run, a packed folder or a hub id."""

import io
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, Literal

from wrinklefree.core.errors import UserError
from wrinklefree.core.text import has_surrogates
from wrinklefree.engine.sampling import out_of_range

if TYPE_CHECKING:
    from wrinklefree.thinking.reply import Think

log = logging.getLogger("wrinklefree")


def run(
    path: str,
    *,
    prompt: str | None,
    interactive: bool,
    chat: bool,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    seed: int = 0,
    think: "Think | None" = None,
    top_k: int | None = None,  # None: the model's generation config decides, for top_p too
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: list[str] | None = None,
    engine: Literal["auto", "native", "transformers"] = "auto",
    threads: int | None = None,
    trust_remote_code: bool = False,
    as_json: bool = False,
) -> None:
    """Continue one prompt, or answer line by line. Raises UserError for options that exclude one another."""
    _check_options(prompt, interactive, chat, think)
    _check_texts(prompt, stop or [])
    if as_json and (prompt is None or think is not None):
        raise UserError("--json: works only with --prompt, and without --think")
    values = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    _check_ranges({name: value for name, value in values.items() if value is not None})
    more: Any = {"top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty, "stop": stop or ()}
    if think is not None and prompt is not None:
        if (*more.values(), engine, threads) != (None, None, 1.0, (), "auto", None):
            raise UserError("--think samples by --temperature and --seed alone: leave the other options out")
        from wrinklefree.thinking.reply import reply

        print(reply(path, prompt, think, max_new_tokens, temperature, seed, trust_remote_code))
        return
    from wrinklefree.generate import generate
    from wrinklefree.generate.open import open_engine
    from wrinklefree.tracking.terminal import show_log_lines

    show_log_lines()
    _allow_any_terminal()
    model, tokenizer, description = open_engine(path, engine, threads, trust_remote_code=trust_remote_code)
    log.info("%s", description)
    if prompt is None:
        generate.interactive(model, tokenizer, chat, max_new_tokens, temperature, seed, **more)
    elif as_json:
        choice = generate.SamplingOptions(max_new_tokens, temperature, seed, **more)
        start = time.perf_counter()
        said = generate.answer(model, tokenizer, prompt, choice)
        seconds = round(time.perf_counter() - start, 3)
        print(json.dumps({"model": path, "prompt": prompt, **vars(said), "seconds": seconds, "engine": description}))
    else:
        generate.stream(model, tokenizer, prompt, max_new_tokens, temperature=temperature, seed=seed, **more)


def _allow_any_terminal() -> None:
    """Write what a terminal cannot show as escapes, and read bytes that are no text without ending."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _check_texts(prompt: str | None, stops: list[str]) -> None:
    """Raise UserError for a text that is not UTF-8, and for an empty stop string."""
    for option, text in [("--prompt", prompt or ""), *(("--stop", stop) for stop in stops)]:
        if has_surrogates(text):
            raise UserError(f"{option}: not UTF-8 text; convert it, for instance with iconv")
    if "" in stops:
        raise UserError("--stop '': an empty text is everywhere; leave the option out")


def _check_ranges(values: dict[str, float]) -> None:
    """Raise UserError if an option is out of the range of `Sampling`."""
    wrong = out_of_range(values)
    if wrong is not None:
        raise UserError(f"--{wrong[0].replace('_', '-')} {values[wrong[0]]:g}: must be {wrong[1]}")


def _check_options(prompt: str | None, interactive: bool, chat: bool, think: "Think | None") -> None:
    """Raise UserError unless exactly one of `prompt` and `interactive` is given, with options that fit it."""
    if (prompt is None) == (not interactive):
        raise UserError("give either --prompt TEXT or --interactive")
    if chat and not interactive:
        raise UserError("--chat: works only with --interactive")
    if think is not None and prompt is None:
        raise UserError("--think: works only with --prompt")
