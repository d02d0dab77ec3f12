"""The one set-up of every training: its processes, resume point, model, plan, data and evaluation.

run = open_run(config, force)       checks everything; nothing is written or removed
...                                 make the model to train and its objective, which may still fail
run.begin()                         now the folder is made
run.fit(model, objective)           the loop
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import config_yaml
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch, labelled
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.read import KDCache, KDStream
from wrinklefree.data.open import heldout_batches, heldout_examples, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.sources import Example
from wrinklefree.distributed.sharding import Whole, choose_placement
from wrinklefree.distributed.world import World, barrier, gather, join_world
from wrinklefree.evaluate.accuracy import Accuracy, choose, measure_accuracy
from wrinklefree.evaluate.perplexity import Quality, measure, quantization_error
from wrinklefree.models.load import Loaded, load_pretrained
from wrinklefree.objectives.base import Objective
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.runs.folder import make_run_folder, resume_point
from wrinklefree.training.loop import Evaluate, OnStep, do_nothing, fit
from wrinklefree.training.plan import Plan, choose_length, make_plan
from wrinklefree.training.state import Stream

log = logging.getLogger("wrinklefree")


@dataclass
class Run:
    """What every training works with; `config` is resolved, `model` is the one that the run starts from."""

    config: Config
    world: World
    resume: Path | None  # the checkpoint to go on from
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    placement: Whole
    plan: Plan

    @property
    def out(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output_dir)

    @property
    def is_main(self) -> bool:
        """Whether this process does the writing."""
        return self.world.is_main

    def begin(self) -> None:
        """Make the folder of the run, or keep it if the run is resumed. Every process has to call it."""
        barrier(self.world)  # all have read what they start from, which may be in that folder
        if self.is_main and self.resume is None:
            make_run_folder(self.config)

    def stream(self) -> BatchStream | KDStream:
        """The training batches of this process, from the first on."""
        return open_stream(self.config, self.tokenizer, self.world)

    def heldout(self, max_tokens: int | None) -> list[Batch]:
        """Held-out batches of the run's length."""
        return heldout(self.config, self.tokenizer, max_tokens)

    def fit(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        teacher: PreTrainedModel | None = None,
        stream: Stream | None = None,
        evaluate: Evaluate | None = None,
        on_step: OnStep | None = None,
    ) -> Path:
        """Train `model`, which has been placed with its teacher, and return the folder `final/`.

        Before each step `on_step` is called, or without it the method's.
        """
        if on_step is None and self.config.method is not None:
            on_step = self.config.method.on_step
        return fit(
            model,
            objective,
            stream or self.stream(),
            self.config.training,
            self.plan,
            out=self.out,
            tokenizer=self.tokenizer,
            settings=config_yaml(self.config),
            world=self.world,
            evaluate=evaluate or evaluator(self.config, self.tokenizer),
            placement=self.placement.only(model, teacher),
            resume=self.resume,
            on_step=on_step or do_nothing,
        )

    def quality(
        self, model: PreTrainedModel, batches: list[Batch], reference: PreTrainedModel | None = None
    ) -> Quality:
        """Held-out quality of a placed model, in the precision of the run."""
        with self.plan.autocast(model.device):
            return self.placement.with_whole_parameters(partial(measure, model, batches, reference))

    def accuracy(self, model: PreTrainedModel, examples: list[Example]) -> Accuracy:
        """Accuracy of a placed model on the examples of a task, in the precision of the run."""
        size, length = 4 * self.config.training.batch_size, self.plan.length
        score = partial(measure_accuracy, model, self.tokenizer, examples, batch_size=size, length=length)
        with self.plan.autocast(model.device):
            return self.placement.with_whole_parameters(score)


def open_run(
    config: Config,
    force: bool = False,
    *,
    load: Callable[[Config], Loaded] | None = None,
    world: World | None = None,
) -> Run:
    """Join the other processes, load the model and resolve every `auto` of `config`, in place.

    `load` makes the model and its tokenizer; without it, they are the pretrained ones. The random numbers start anew
    from the seed before that. Nothing is written or removed.

    Raises UserError for anything that the user can mend: a folder that holds another run (unless `force`), a
    checkpoint or model that is not there, settings that do not go together.
    """
    world = world or join_world()
    resume = gather(resume_point(config, force) if world.is_main else None, world)[0]
    torch.manual_seed(config.seed)
    model, tokenizer = (load or load_original)(config)
    t = config.training
    t.max_seq_length = length = choose_length(t.max_seq_length, model, config.distillation.cache)
    placement = choose_placement(config.distributed, t.compile, world)
    model.to(placement.build_device)
    plan = make_plan(t, config.model, model, length, world)
    return Run(config, world, resume, model, tokenizer, placement, plan)


def load_original(config: Config) -> Loaded:
    """The pretrained model, frozen, and its tokenizer."""
    log.info("loading %s", config.model.pretrained)
    model, tokenizer = load_pretrained(config.model)
    return model.requires_grad_(False), tokenizer


def open_stream(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> BatchStream | KDStream:
    """The endless training batches of this process: of the KD cache where there is one, else of the data."""
    t = config.training
    if config.distillation.cache is not None:
        cache = open_cache(config.distillation.cache, tokenizer)
        return KDStream(cache, batch_size=t.batch_size, seed=config.seed, rank=world.rank, world_size=world.size)
    return training_stream(
        config.data,
        tokenizer,
        batch_size=t.batch_size,
        length=resolved_length(config),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )


def open_cache(folder: str, tokenizer: PreTrainedTokenizerBase) -> KDCache:
    """A KD cache for a student of this tokenizer. Raises UserError where it is broken, or of another tokenizer."""
    cache = KDCache(Path(folder))
    cache.check_tokenizer(tokenizer)
    return cache


def heldout(config: Config, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[Batch]:
    """Held-out batches at the training context length."""
    t = config.training
    return heldout_batches(
        config.data, tokenizer, batch_size=t.batch_size, length=resolved_length(config), max_tokens=max_tokens
    )


def evaluator(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[nn.Module], dict[str, float]]:
    """What `fit` calls every `eval_interval` steps: held-out loss and quantization errors."""
    if config.distillation.cache is not None:
        return _cached_evaluator(config, open_cache(config.distillation.cache, tokenizer))
    batches = heldout(config, tokenizer, config.training.eval_tokens)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        errors = {f"quant_error/{name}": value for name, value in quantization_error(model).items()}
        return {"eval_loss": measure(model, batches).nll, **errors}

    return evaluate


def _cached_evaluator(config: Config, cache: KDCache) -> Callable[[nn.Module], dict[str, float]]:
    """The loss that is trained for, and its parts, on held-out sequences of the cache."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        objective, sums, count = CachedKD(model, config.distillation), torch.zeros(3, dtype=torch.float64), 0
        for batch in cache.heldout(config.training.batch_size, config.training.eval_tokens):
            here = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses, num = objective.compare(here), int(labelled(batch).sum())
            sums += num * torch.stack([losses.loss, losses.ce, losses.kl]).double().cpu()
            count += num
        values = dict(zip(("eval_loss", "eval_ce", "eval_kl"), (sums / count).tolist(), strict=True))
        return values | {f"quant_error/{name}": value for name, value in quantization_error(model).items()}

    return evaluate


def examples(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Held-out examples of a task with a fixed set of answers; none for other data."""
    return choose(heldout_examples(config.data, tokenizer), config.training.eval_examples)


def resolved_length(config: Config) -> int:
    """The sequence length of a config that `open_run` has resolved. Raises UserError if it is still `auto`."""
    length = config.training.max_seq_length
    if isinstance(length, str):
        raise UserError("training.max_seq_length=auto: the model has not been loaded yet")
    return length
