"""The set-up of a compressor: a frozen language model, its text, and the pass over it."""

import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.distributed.world import World
from wrinklefree.objectives.base import Batch
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.runs import setup
from wrinklefree.thinking import gathering, loading
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.network import LatentThinker, make_thinker
from wrinklefree.thinking.reconstruction import MarkedStream, Reconstruction, mark
from wrinklefree.training.plan import Plan, choose_length, make_plan, sequence_length

log = logging.getLogger("wrinklefree")


class Bench(NamedTuple):
    """What the compressors of a run, or of a sweep, have in common."""

    world: World
    plan: Plan
    decoder: BodyAndHead
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    watched: list[Batch]  # marked held-out batches, for evaluations during training
    judged: list[Batch]  # marked held-out batches, for the reported figures

    @property
    def width(self) -> int:
        """D, from the model's own config."""
        width: int = self.model.get_input_embeddings().embedding_dim
        return width

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run."""
        dtype = self.plan.dtype
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def stream(self, config: Config) -> MarkedStream:
        """The training text from its beginning."""
        return MarkedStream(setup.open_stream(config, self.tokenizer, self.world), self.tokenizer.eos_token_id)

    def thinker(self, config: Config) -> LatentThinker:
        """A new thinker, whose compressor alone is trained. Raises UserError if D' is wider than the model."""
        torch.manual_seed(config.seed)
        thinker = make_thinker(self.model, loading.settings_of(config))
        thinker.requires_grad_(False)
        thinker.compressor.requires_grad_(True)
        return thinker.to(self.world.device)

    def gather(self, config: Config) -> Gathered:
        """Run the pass over the training text."""
        settings, length = loading.settings_of(config), sequence_length(config)
        with self.autocast():
            return gathering.gather_moments(
                self.decoder,
                self.stream(config),
                self.world,
                blocks=-(-settings.moment_tokens // length),
                batch_size=config.training.batch_size,
                width=self.width,
                weighted=settings.objective == "fisher",
            )


class Made(NamedTuple):
    """A finished compressor; `final` is the folder of its thinker."""

    config: Config
    thinker: LatentThinker
    objective: Reconstruction
    final: Path


def open_bench(config: Config, world: World) -> Bench:
    """Load the language model and its text. Raises UserError for settings that have no effect on a compressor."""
    t = config.training
    unread = {
        "distributed.strategy=fsdp": config.distributed.strategy == "fsdp",
        "training.gradient_checkpointing=true": t.gradient_checkpointing,
        "training.freeze_names": bool(t.freeze_names),
    }
    for setting, given in unread.items():
        if given:
            raise UserError(f"{setting}: has no effect on a compressor, whose language model is frozen: leave it out")
    log.info("loading %s", config.model.pretrained)
    model, tokenizer = loading.load_language_model(config)
    choose_length(config, model)
    plan = make_plan(config, model, world)
    model.to(world.device)
    watched, judged = (
        [mark(batch, tokenizer.eos_token_id) for batch in setup.heldout(config, tokenizer, tokens)]
        for tokens in (t.eval_tokens, t.final_eval_tokens)
    )
    return Bench(world, plan, BodyAndHead(model, t.compile), model, tokenizer, watched, judged)
