"""`wf pretrain`: train a small Llama and its tokenizer from scratch, on text that Python ships with or on a task."""

import dataclasses
import logging
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import config_yaml, load_config
from wrinklefree.config.schema import ArchitectureConfig, Config
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import written_aside
from wrinklefree.data import chains, stdlib
from wrinklefree.data.sources import Split
from wrinklefree.data.tokenizer import train_tokenizer
from wrinklefree.distributed.world import World, own_device
from wrinklefree.evaluate.perplexity import Quality, measure
from wrinklefree.models.load import Loaded, load_model
from wrinklefree.objectives.kinds.language_modelling import Objective as LanguageModelling
from wrinklefree.runs import launch
from wrinklefree.runs.report import RESULTS, Results
from wrinklefree.runs.setup import Run, open_run, open_stream
from wrinklefree.training.plan import choose_length, make_plan

log = logging.getLogger("wrinklefree")

SPLITS: tuple[Split, Split] = ("train", "heldout")

CARD = """\
# {name}: a small Llama for trying things out

{parameters:.2f} M parameters, trained from nothing on the text of Python's own standard library ({train_files} files,
{tokens:.1f} M tokens seen) by `wf pretrain model={name}`, seed {seed}, Python {python}. It writes text shaped like
Python; it knows nothing.

| held-out text | value |
|---|---|
| files of the library that it never saw | {heldout_files} |
| tokens scored | {heldout_tokens:,} |
| context length | {context} |
| loss, nats per token | {nll:.4f} |
| perplexity | {ppl:.2f} |

Byte-level BPE of {vocab:,} tokens with a ChatML template. The text is under the Python Software Foundation License.
"""


def run(overrides: list[str], *, force: bool = False, processes: int | None = None, dry_run: bool = False) -> None:
    """Pretrain a model of the sizes in `model.architecture`. With `dry_run`, only say what would be done.

    Writes `final/` in fp32. For the library's text it also writes `shipped/` in bf16, with a model card.
    Raises UserError if the model config has no architecture.
    """
    config = load_config(overrides, "pretrain")
    if config.model.architecture is None:
        raise UserError(f"model={config.model.name}: has no architecture to train from scratch; try model=tiny")
    if config.training.max_minutes is not None:
        raise UserError(
            "training.max_minutes: not for `wf pretrain`, whose text changes at a step that is known before"
        )
    number = launch.count_processes(config, processes)
    if dry_run:
        show(config, number)
    elif number > 1:
        launch.torchrun("pretrain", number, overrides, force)
    else:
        train(config, force)


def show(config: Config, processes: int) -> None:
    """Print the settings, and say what would be read, trained and written."""
    assert config.model.architecture is not None
    print(config_yaml(config), end="")
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(config.model.architecture, config.model.architecture.vocab_size))
    length = choose_length(config.training.max_seq_length, model, None)
    log.info("a new Llama of %s parameters and its tokenizer", f"{model.num_parameters():,}")
    if config.data.source == "stdlib":
        log.info(
            "reads %d files of Python's standard library, and %d held out",
            *(len(stdlib.files(split)) for split in SPLITS),
        )
    plan = make_plan(config.training, config.model, model, length, World(0, processes, own_device()))
    log.info(
        "trains on %s tokens; how long that takes is shown with the first steps",
        f"{plan.max_steps * plan.tokens_per_step:,}",
    )
    shipped = ", and shipped/ in bf16 with a model card" if config.data.source == "stdlib" else ""
    log.info("writes %s/: final/ (checkpoint)%s", config.output_dir, shipped)
    log.info("dry run: nothing was trained or written")


def train(config: Config, force: bool) -> None:
    """Pretrain in this process, which is the only one or one of torchrun's."""
    with open_run(config, force, load=build_model) as run:
        _train(run)


def _train(run: Run) -> None:
    config = run.config
    objective = LanguageModelling(run.model, config.distillation, compiled=config.training.compile)
    run.begin()
    run.placement.place(run.model)
    final = run.fit(run.model, objective, stream=Curriculum(run) if config.data.tests else None)
    if run.is_main:
        model = run.model if run.world.size == 1 else load_model(final)[0]
        quality = ship(run, model) if config.data.source == "stdlib" else _measure(run, model)
        Results(context=run.plan.length, trained=quality).save(run.out / RESULTS)


def build_model(config: Config) -> Loaded:
    """The model to train, with random weights, and its tokenizer."""
    assert config.model.architecture is not None
    tokenizer = make_tokenizer(config, config.model.architecture.vocab_size)
    return build(config.model.architecture, tokenizer), tokenizer


def make_tokenizer(config: Config, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the task mod7_chains, or else a byte-level BPE tokenizer trained on the library's text."""
    if config.data.task == chains.NAME:
        return chains.tokenizer()
    return train_tokenizer(stdlib.documents("train"), vocab_size)


class Curriculum(Iterator[Batch]):
    """A stream that begins with all text, tests included. While the learning rate decays, it has only library text.

    The held-out text is library text, too. Held-out perplexity of a small model at equal steps (LOG.md):

    | training text | perplexity |
    |---|---|
    | all, then the library | 65.7 |
    | all | 75.8 |
    | the library | 73.9 |
    """

    def __init__(self, run: Run) -> None:
        library = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, tests=False))
        self.streams = [open_stream(config, run.tokenizer, run.world) for config in (run.config, library)]
        # In tokens, because a resumed run may have batches of another size.
        self.tokens_per_batch = run.plan.tokens_per_step // run.config.training.gradient_accumulation_steps
        decay_start = 1 - run.config.training.scheduler.decay_ratio
        self.switch, self.tokens = int(run.plan.max_steps * decay_start) * run.plan.tokens_per_step, 0

    def __next__(self) -> Batch:
        batch = next(self.streams[self.tokens >= self.switch])
        self.tokens += self.tokens_per_batch
        return batch

    @property
    def skipped(self) -> int:
        return sum(stream.skipped for stream in self.streams)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Version 0.1 counted batches.
        self.tokens = state["tokens"] if "tokens" in state else state["served"] * self.tokens_per_batch
        for stream, saved in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(saved)


def build(architecture: ArchitectureConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama with random weights. The last projection of each block starts at zero."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    special |= {"pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(llama_config(architecture, len(tokenizer), **special))
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # so each block starts as the identity
            nn.init.zeros_(parameter)
    return model


def llama_config(architecture: ArchitectureConfig, vocab_size: int, **ids: int | None) -> LlamaConfig:
    """The sizes as transformers names them. `ids` are those of special tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=architecture.num_hidden_layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        max_position_embeddings=architecture.max_position_embeddings,
        attention_dropout=architecture.dropout,
        tie_word_embeddings=architecture.tie_word_embeddings,
        **ids,
    )


def ship(run: Run, model: PreTrainedModel) -> Quality:
    """Write `shipped/`: bf16 weights, tokenizer, and a model card with their held-out perplexity, which is returned."""
    # Round the weights first, so that the card gives the perplexity of exactly the weights that are shipped.
    model = model.to(torch.bfloat16).float()
    quality = _measure(run, model)
    out = run.out / "shipped"
    with written_aside(out) as aside:
        model.to(torch.bfloat16).save_pretrained(aside)
        run.tokenizer.save_pretrained(aside)
        (aside / "README.md").write_text(card(run, model, quality))
    log.info("held-out perplexity %.2f; wrote %s", quality.ppl, out)
    return quality


def _measure(run: Run, model: PreTrainedModel) -> Quality:
    with run.plan.autocast(model.device):
        return measure(model, run.heldout(None))


def card(run: Run, model: PreTrainedModel, quality: Quality) -> str:
    """The text of the model card."""
    return CARD.format(
        name=run.config.model.name,
        parameters=model.num_parameters() / 1e6,
        train_files=len(stdlib.files("train")),
        tokens=run.plan.max_steps * run.plan.tokens_per_step / 1e6,
        seed=run.config.seed,
        python=platform.python_version(),
        heldout_files=len(stdlib.files("heldout")),
        heldout_tokens=quality.tokens,
        context=run.plan.length,
        nll=quality.nll,
        ppl=quality.ppl,
        vocab=model.config.vocab_size,
    )
