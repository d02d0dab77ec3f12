"""The set-up that every training shares: processes, resume point, model, plan, data and evaluation.

with open_run(config, force) as run:    check everything; write and remove nothing
    ...                                 make the model to train and its objective; either may raise UserError
    run.begin()                         make and lock the output folder
    run.fit(model, objective)           train
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import Self

from wrinklefree.config.compose import saved_yaml
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.data.kd_cache.read import KDCache, KDStream
from wrinklefree.data.open import check_written, heldout_batches, heldout_examples, is_unwritten, training_stream
from wrinklefree.data.packing import BatchStream
from wrinklefree.data.preview import Size
from wrinklefree.data.sources import Example
from wrinklefree.distributed.sharding import Whole, choose_placement
from wrinklefree.distributed.world import World, barrier, gather, join_world, leave_world
from wrinklefree.evaluate.accuracy import Accuracy, choose, measure_accuracy
from wrinklefree.evaluate.perplexity import Quality, measure, quantization_error
from wrinklefree.models.load import Loaded, load_pretrained, load_stored
from wrinklefree.objectives.base import LOSS, Objective
from wrinklefree.objectives.documents import check_causal, keeps_apart, takes_positions
from wrinklefree.objectives.kinds.cached_kd import Objective as CachedKD
from wrinklefree.runs import folder, preflight, self_text
from wrinklefree.training.budget import Budget, Clock
from wrinklefree.training.loop import Evaluate, OnStep, do_nothing, fit
from wrinklefree.training.plan import Plan, choose_length, choose_minutes, make_plan
from wrinklefree.training.state import Stream

log = logging.getLogger("wrinklefree")


@dataclass
class Run:
    """Everything that a training needs. Use it as a context manager; its end unlocks the output folder.

    `plan` says what each `auto` of `config` came to; with a budget, its number of steps is known once `fit` has begun.
    `model` is the model that the run starts from.
    """

    config: Config
    world: World
    resume: Path | None  # the checkpoint to resume from
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    placement: Whole
    plan: Plan
    text: Size | None = None  # of the training data, until it is said how often that is gone through
    budget: Budget | None = None  # the minutes of the stage
    force: bool = False  # whether an earlier run in the output folder is replaced
    joined: bool = False  # whether this run has joined the other processes, and so has to leave them
    clock: Clock = time.monotonic
    started: float = 0.0  # on that clock
    lock: ExitStack = field(default_factory=ExitStack)

    @property
    def out(self) -> Path:
        """The output folder of the run."""
        return Path(self.config.output_dir)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.world.is_main

    def begin(self) -> None:
        """Make the output folder, or keep it if the run is resumed. Every process has to call this.

        Raises UserError if another process trains there.
        """
        # Other processes may still be reading the model they start from, and it may lie in the folder to be cleared.
        barrier(self.world)
        if self.is_main:
            self.lock.enter_context(folder.writing(self.config, self.resume, self.force))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lock.close()
        if self.joined and error is None:
            leave_world()

    def stream(self) -> BatchStream | KDStream:
        """This process's training batches, from the first one."""
        return open_stream(self.config, self.tokenizer, self.world)

    def heldout(self, max_tokens: int | None) -> list[Batch]:
        """Held-out batches with the run's sequence length, at most `max_tokens` tokens; None means all."""
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
        forecast: bool = False,
    ) -> Path:
        """Train `model` and return the folder `final/`. The model and its teacher must have been placed.

        `on_step` is called before each step. By default it is the quantization method's. With `forecast`, a long
        training begins with a line that says how long it takes.
        """
        if on_step is None and self.config.method is not None:
            on_step = self.config.method.on_step
        if self.budget is not None:
            self.budget.on_plan = self.planned
        return fit(
            model,
            objective,
            stream or self.stream(),
            self.config.training,
            self.plan,
            out=self.out,
            tokenizer=self.tokenizer,
            settings=saved_yaml(self.config),
            world=self.world,
            evaluate=evaluate or evaluator(self.config, self.tokenizer),
            placement=self.placement.only(model, teacher),
            resume=self.resume,
            on_step=on_step or do_nothing,
            on_resumed=None if self.resume is None else partial(folder.go_on, self.out, self.resume),
            forecast=forecast,
            budget=self.budget,
        )

    def planned(self, plan: Plan) -> None:
        """Take over the plan that fits the budget. The first time, log how often it goes through the text."""
        self.plan, text, self.text = plan, self.text, None
        if text is not None:
            preflight.say_passes(self.config, text, plan)

    def quality(
        self, model: PreTrainedModel, batches: list[Batch], reference: PreTrainedModel | None = None
    ) -> Quality:
        """A placed model's perplexity on `batches`, and its KL to `reference`, in the run's precision."""
        with self.plan.autocast(model.device):
            return self.placement.with_whole_parameters(
                partial(measure, model, batches, reference, len(self.tokenizer))
            )

    def accuracy(self, model: PreTrainedModel, examples: list[Example]) -> Accuracy:
        """Accuracy of a placed model on task examples, in the run's precision."""
        size, length = 4 * self.config.training.batch_size, self.plan.length
        score = partial(measure_accuracy, model, self.tokenizer, examples, batch_size=size, length=length)
        with self.plan.autocast(model.device):
            return self.placement.with_whole_parameters(score)


def open_run(
    config: Config,
    force: bool = False,
    *,
    load: Callable[[Config], Loaded] | None = None,
    given: Loaded | None = None,
    reads_text: bool = True,
    world: World | None = None,
    clock: Clock = time.monotonic,
) -> Run:
    """Join the other processes, load the model, and make the plan that every `auto` comes to.

    Only `max_seq_length` and `data.rows` are written into `config`, and with `data=self` the path of the text. On the
    disk nothing is written or removed but that text, which belongs to no run.

    `reads_text` says whether the run trains on `config.data`; if not, that is not looked at.

    The minutes of the stage, if it has such, begin with this call; `clock` measures them.

    `load` makes the model and its tokenizer, after the random numbers have been seeded. By default it loads the
    pretrained ones. `given` are a model and its tokenizer that are in memory already, in place of the pretrained ones.

    Raises UserError for anything that the user can fix, such as
    - an output folder that already holds a run, unless `force` is given,
    - a checkpoint or model that does not exist,
    - settings that exclude one another.
    """
    started = clock()
    joined, world = world is None, world or join_world()
    checked = _checked(config, force, reads_text, load is not None, given) if world.is_main else None
    resume = gather(checked, world)[0]
    torch.manual_seed(config.seed)
    model, tokenizer = given or (load or load_original)(config)
    t = config.training
    minutes = choose_minutes(t, config.model, world.device)
    t.max_seq_length = length = choose_length(t.max_seq_length, model, config.distillation.cache, minutes)
    placement = choose_placement(config.distributed, t.compile, world)
    model.to(placement.build_device)
    if reads_text:
        config.data.rows = choose_rows(config, model)
    plan = make_plan(t, config.model, model, length, world)
    if reads_text and load is None and is_unwritten(config.data):
        preflight.check_unwritten(config, tokenizer, plan)  # before the model writes for minutes
        earlier = folder.text_of(config, resume) if world.is_main else None
        self_text.write(config, model, tokenizer, world, plan.minutes, earlier)
    text = preflight.check_passes(config, tokenizer, plan) if reads_text else None
    budget = None if plan.minutes is None else Budget(plan.minutes, clock, started, t.budget_minutes)
    return Run(config, world, resume, model, tokenizer, placement, plan, text, budget, force, joined, clock, started)


def choose_rows(config: Config, model: PreTrainedModel) -> Literal["packed", "one_document"]:
    """Return how documents are put into rows: `data.rows`, or if that is auto, what the model needs.

    Raises UserError if the model is not causal, or if it cannot keep the documents of a KD cache apart.
    """
    check_causal(model)
    name, rows = type(model).__name__, config.data.rows
    packs = rows == "packed" or (rows == "auto" and not config.data.document_mask)
    if packs and not takes_positions(model):
        raise UserError(f"data.rows=packed, data.document_mask=false: {name} takes no positions: leave both out")
    if rows != "auto":
        return rows
    if packs or keeps_apart(model):
        return "packed"
    if config.distillation.cache is not None:
        raise UserError(
            f"distillation.cache: its rows hold several documents, and {name} cannot keep these apart: distil from a "
            f"running teacher (distillation=logits), or allow it (data.document_mask=false)"
        )
    log.info("%s does not keep documents in one row apart: each row holds one (data.rows=packed packs them)", name)
    return "one_document"


def _checked(config: Config, force: bool, reads_text: bool, own_model: bool, given: Loaded | None) -> Path | None:
    """Return the checkpoint to resume from. Raises UserError for all that can be known before the model is loaded."""
    resume = folder.resume_point(config, force)
    preflight.check_places(config)
    if given is not None:
        preflight.check_text(config, reads_text, given[1])
    elif not own_model:
        preflight.check_model(config, reads_text)
    elif reads_text:
        check_written(config.data)
    return resume


def load_original(config: Config) -> Loaded:
    """Load the pretrained model, with all parameters frozen, and its tokenizer."""
    log.info("loading %s", config.model.pretrained)
    model, tokenizer = load_stored(config.model) if preflight.stays_stored(config) else load_pretrained(config.model)
    return model.requires_grad_(False), tokenizer


def open_stream(config: Config, tokenizer: PreTrainedTokenizerBase, world: World) -> BatchStream | KDStream:
    """An endless stream of training batches for this process. They come from the KD cache, if `config` names one."""
    t = config.training
    if config.distillation.cache is not None:
        cache = open_cache(config.distillation.cache, tokenizer)
        return KDStream(
            cache,
            batch_size=t.batch_size,
            seed=config.seed,
            rank=world.rank,
            world_size=world.size,
            allow_changes=config.data.allow_changes,
        )
    return training_stream(
        config.data,
        tokenizer,
        batch_size=t.batch_size,
        length=resolved_length(config),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
    )


def open_cache(path: str, tokenizer: PreTrainedTokenizerBase) -> KDCache:
    """Open a KD cache. Raises UserError if it is damaged, or was written with another tokenizer."""
    cache = KDCache(Path(path))
    cache.check_tokenizer(tokenizer)
    return cache


def heldout(config: Config, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> list[Batch]:
    """Held-out batches with the training's sequence length, at most `max_tokens` tokens; None means all."""
    t = config.training
    return heldout_batches(
        config.data, tokenizer, batch_size=t.batch_size, length=resolved_length(config), max_tokens=max_tokens
    )


def evaluator(config: Config, tokenizer: PreTrainedTokenizerBase) -> Callable[[nn.Module], dict[str, float]]:
    """The function that `fit` calls every `eval_interval` steps. It returns held-out loss and quantization errors."""
    if config.distillation.cache is not None:
        return _cached_evaluator(config, open_cache(config.distillation.cache, tokenizer))
    batches = heldout(config, tokenizer, config.training.eval_tokens)

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        errors = {f"quant_error/{name}": value for name, value in quantization_error(model).items()}
        return {"eval_loss": measure(model, batches).nll, **errors}

    return evaluate


def _cached_evaluator(config: Config, cache: KDCache) -> Callable[[nn.Module], dict[str, float]]:
    """A function that returns the training loss and its parts on the cache's held-out sequences."""

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PreTrainedModel)
        objective = CachedKD(model, config.distillation)
        sums, totals = defaultdict[str, float](float), defaultdict[str, float](float)
        for batch in cache.heldout(config.training.batch_size, config.training.eval_tokens):
            here = {name: tensor.to(model.device) for name, tensor in batch.items()}
            losses, counts = objective.compare(here), objective.counts(here)
            for name, value in {**losses.terms(), "ce": losses.ce, "kl": losses.kl}.items():
                count = counts.get(name, counts[LOSS]).item()
                sums[name] += value.double().item() * count
                totals[name] += count
        means = {name: total / max(1, totals[name]) for name, total in sums.items()}
        errors = {f"quant_error/{name}": value for name, value in quantization_error(model).items()}
        loss = means[LOSS] + means.get("hard_full", 0.0)
        return {"eval_loss": loss, "eval_ce": means["ce"], "eval_kl": means["kl"], **errors}

    return evaluate


def examples(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Held-out examples of a task that has a fixed set of answers; an empty list for other data."""
    return choose(heldout_examples(config.data, tokenizer), config.training.eval_examples)


def resolved_length(config: Config) -> int:
    """`training.max_seq_length` as a number. Raises UserError if it is still `auto`, because `open_run` resolves it."""
    length = config.training.max_seq_length
    if isinstance(length, str):
        raise UserError("training.max_seq_length=auto: the model has not been loaded yet")
    return length
