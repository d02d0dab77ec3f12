"""`wf generate`: text from any model: a run, a packed folder, a hub id."""

from typing import TYPE_CHECKING

from wrinklefree.core.errors import UserError

if TYPE_CHECKING:
    from wrinklefree.thinking.reply import Think


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
) -> None:
    """Continue one prompt, or answer line by line. Raises UserError where it is not said which of the two."""
    if (prompt is None) == (not interactive):
        raise UserError("say either --prompt TEXT or --interactive")
    if chat and not interactive:
        raise UserError("--chat goes with --interactive")
    if think is not None and prompt is None:
        raise UserError("--think goes with --prompt")
    if think is not None and prompt is not None:
        from wrinklefree.thinking.reply import reply

        print(reply(path, prompt, think, max_new_tokens, temperature, seed))
        return
    from wrinklefree import generate
    from wrinklefree.locate import open_model

    model, tokenizer = open_model(path)
    if prompt is None:
        generate.interactive(model, tokenizer, chat, max_new_tokens, temperature, seed)
    else:
        generate.stream(model, tokenizer, prompt, max_new_tokens, temperature, seed)
