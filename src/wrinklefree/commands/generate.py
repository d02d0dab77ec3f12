"""`wf generate`: generate text with a run, a packed folder or a hub id."""

import logging
from typing import TYPE_CHECKING, Any, Literal

from wrinklefree.core.errors import UserError
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
) -> None:
    """Continue one prompt, or answer line by line. Raises UserError for options that exclude one another."""
    _check_options(prompt, interactive, chat, think)
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
    model, tokenizer, description = open_engine(path, engine, threads, trust_remote_code=trust_remote_code)
    log.info("%s", description)
    if prompt is None:
        generate.interactive(model, tokenizer, chat, max_new_tokens, temperature, seed, **more)
    else:
        generate.stream(model, tokenizer, prompt, max_new_tokens, temperature=temperature, seed=seed, **more)


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
