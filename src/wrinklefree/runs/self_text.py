"""`data=self`: a run's original model writes the text to train on, or wrote it for an earlier run."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.data.open import is_unwritten
from wrinklefree.data.preview import preview
from wrinklefree.data.questions import read_questions
from wrinklefree.distributed.world import World, gather
from wrinklefree.generate.selftext.write import Wish, kept_in, self_text

SHARE = 0.15  # of the minutes of a training

FOLDER = "self_text"  # in `output_root`, for all methods and stages


def wish(config: Config, minutes: float | None = None) -> Wish:
    """What the settings want written, in a training of so many minutes."""
    d = config.data
    return Wish(
        tokens=d.self_tokens,
        minutes=limit(config, minutes),
        length=d.self_length,
        chat_share=d.self_chat,
        temperature=d.self_temperature,
        top_p=d.self_top_p,
        seed=d.self_seed,
        questions=tuple(read_questions(Path(d.self_questions))) if d.self_questions else (),
    )


def limit(config: Config, minutes: float | None) -> float | None:
    """The most minutes of writing: what is set, or else a share of the minutes of the training, if it has any."""
    if config.data.self_minutes is not None or minutes is None:
        return config.data.self_minutes
    return SHARE * minutes


def folder(config: Config) -> Path:
    """Where texts are kept that models wrote: beside the runs of all experiments."""
    return Path(config.output_root) / FOLDER


def describe(config: Config, tokenizer: PreTrainedTokenizerBase, minutes: float | None = None) -> str:
    """Say what would be written before a training of so many minutes."""
    d = config.data
    share = 1 if d.self_questions else d.self_chat
    chats = share if tokenizer.chat_template else 0
    most = limit(config, minutes)
    within = "" if most is None else f" in at most {most:g} minutes"
    return (
        f"data=self: unless {folder(config)} has it, {config.model.name} first writes {d.self_tokens:,} tokens"
        f"{within}, in documents of at most {d.self_length} tokens, {chats:.0%} of them conversations"
    )


def write(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    minutes: float | None = None,
    earlier: str | None = None,
) -> None:
    """With `data=self`, let `model` write its text, unless it did before, and name the file in `config`.

    If the training has `minutes`, writing takes a share of them at most. A run that goes on keeps its `earlier` file,
    although it has other minutes now.

    Every process has to call it; the main process writes. Raises UserError if the model cannot write.
    """
    if not is_unwritten(config.data):
        return
    written = (earlier or _written(config, model, tokenizer, minutes)) if world.is_main else None
    config.data.path = gather(written, world)[0]
    if world.is_main:
        preview(config.data, tokenizer)


def _written(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, minutes: float | None) -> str:
    wanted = wish(config, minutes)
    kept = kept_in(folder(config), config.model.name, model, tokenizer, wanted)
    return str(self_text(model, tokenizer, kept, wanted))
