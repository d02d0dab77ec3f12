"""The set-up of a compressor: a frozen language model, its text, and the pass over it."""

import dataclasses
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.runs.setup import Run, open_run
from wrinklefree.thinking import gathering, loading
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.network import LatentThinker, make_thinker
from wrinklefree.thinking.reconstruction import MarkedStream, Reconstruction, mark


class Bench(NamedTuple):
    """What a compressor is made with; the model of the run is the frozen language model."""

    run: Run
    decoder: BodyAndHead
    watched: list[Batch]  # marked held-out batches, for evaluations during training
    judged: list[Batch]  # marked held-out batches, for the reported figures

    def sized(self, config: Config) -> "Bench":
        """The bench of one compressor of a sweep, which has a config of its own."""
        return self._replace(run=dataclasses.replace(self.run, config=config))

    @property
    def width(self) -> int:
        """D, from the model's own config."""
        width: int = self.run.model.get_input_embeddings().embedding_dim
        return width

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the run."""
        return self.run.plan.autocast(self.run.world.device)

    def stream(self) -> MarkedStream:
        """The training text from its beginning."""
        return MarkedStream(self.run.stream(), self.run.tokenizer.eos_token_id)

    def thinker(self) -> LatentThinker:
        """A new thinker, whose compressor alone is trained. Raises UserError if D' is wider than the model."""
        torch.manual_seed(self.run.config.seed)
        thinker = make_thinker(self.run.model, loading.settings_of(self.run.config))
        thinker.requires_grad_(False)
        thinker.compressor.requires_grad_(True)
        return thinker.to(self.run.world.device)

    def gather(self) -> Gathered:
        """Run the pass over the training text."""
        settings = loading.settings_of(self.run.config)
        with self.autocast():
            return gathering.gather_moments(
                self.decoder,
                self.stream(),
                self.run.world,
                blocks=-(-settings.moment_tokens // self.run.plan.length),
                batch_size=self.run.config.training.batch_size,
                width=self.width,
                weighted=settings.objective == "fisher",
                kept=self.run.out,
                identity=self._identity(),
            )

    def _identity(self) -> str:
        """A fingerprint of the model, and of the settings that the pass depends on."""
        config, world = self.run.config, self.run.world
        settings = loading.settings_of(config)
        facts = [dataclasses.asdict(config.data), settings.moment_tokens, settings.objective == "fisher"]
        facts += [config.training.batch_size, config.seed, self.run.plan.length, str(self.run.plan.dtype), world.size]
        return fingerprint([model_fingerprint(self.run.model.state_dict()), *facts])


class Made(NamedTuple):
    """A finished compressor; `final` is the folder of its thinker."""

    config: Config
    thinker: LatentThinker
    objective: Reconstruction
    final: Path


def open_bench(config: Config, force: bool = False) -> Bench:
    """Load the language model and its text. Raises UserError for settings that have no effect on a compressor."""
    t = config.training
    loading.refuse_sharding(config, "a compressor")
    unread = {
        "training.gradient_checkpointing=true": t.gradient_checkpointing,
        "training.freeze_names": bool(t.freeze_names),
    }
    for setting, given in unread.items():
        if given:
            raise UserError(f"{setting}: has no effect on a compressor, whose language model is frozen: leave it out")
    run = open_run(config, force)
    watched, judged = (
        [mark(batch, run.tokenizer.eos_token_id) for batch in run.heldout(tokens)]
        for tokens in (t.eval_tokens, t.final_eval_tokens)
    )
    return Bench(run, BodyAndHead(run.model, t.compile), watched, judged)
