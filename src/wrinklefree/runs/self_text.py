"""`data=self`: a run's original model writes the text to train on, or wrote it for an earlier run."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.data.open import is_unwritten
from wrinklefree.data.preview import preview
from wrinklefree.distributed.world import World, gather
from wrinklefree.generate.selftext.write import Wish, kept_in, self_text

FOLDER = "self_text"  # in `output_root`, for all methods and stages


def wish(config: Config) -> Wish:
    """What the settings want written."""
    d = config.data
    return Wish(
        tokens=d.self_tokens,
        minutes=d.self_minutes,
        length=d.self_length,
        chat_share=d.self_chat,
        temperature=d.self_temperature,
        top_p=d.self_top_p,
        seed=d.self_seed,
    )


def folder(config: Config) -> Path:
    """Where texts are kept that models wrote: beside the runs of all experiments."""
    return Path(config.output_root) / FOLDER


def describe(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say what would be written."""
    d = config.data
    chats = d.self_chat if tokenizer.chat_template else 0
    within = "" if d.self_minutes is None else f" in at most {d.self_minutes:g} minutes"
    return (
        f"data=self: unless {folder(config)} has it, {config.model.name} first writes {d.self_tokens:,} tokens"
        f"{within}, in documents of at most {d.self_length} tokens, {chats:.0%} of them conversations"
    )


def write(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> None:
    """With `data=self`, let `model` write its text, unless it did before, and name the file in `config`.

    Every process has to call it; the main process writes. Raises UserError if the model cannot write.
    """
    if not is_unwritten(config.data):
        return
    written = _written(config, model, tokenizer) if world.is_main else None
    config.data.path = gather(written, world)[0]
    if world.is_main:
        preview(config.data, tokenizer)


def _written(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    wanted = wish(config)
    kept = kept_in(folder(config), config.model.name, model, tokenizer, wanted)
    return str(self_text(model, tokenizer, kept, wanted))
