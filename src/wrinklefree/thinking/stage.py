"""What the stages that train on hidden pairs share: the set-up, the loop, the judging of answers, the report."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from wrinklefree.config.schema import Config
from wrinklefree.config.thinking import ThinkingConfig
from wrinklefree.core import surgery
from wrinklefree.core.batch import Batch
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import write_json
from wrinklefree.data.shuffled import ShuffledStream
from wrinklefree.objectives.base import Objective
from wrinklefree.runs import prerequisites
from wrinklefree.runs.report import RESULTS
from wrinklefree.runs.setup import Run, open_run
from wrinklefree.thinking import hidden_pairs, loading
from wrinklefree.thinking.hidden_pairs import HiddenPairs, answers_of, prompts_of
from wrinklefree.thinking.network import LatentThinker, make_thinker
from wrinklefree.thinking.recursion import prompt_of
from wrinklefree.thinking.speech import Speaker
from wrinklefree.tracking.plotting import plot_runs
from wrinklefree.tracking.terminal import print_table

WHITENED_PAIRS = 2048  # that the mean and deviation of compressed states are taken from
HELDOUT_BATCH = 250

Figures = dict[str, float]


class StageSetup(NamedTuple):
    """What a stage after the pairs works with; the model of the run is the frozen language model."""

    run: Run
    thinker: LatentThinker
    train: HiddenPairs
    heldout: HiddenPairs


def open_stage(config: Config, force: bool, anew: bool = False) -> StageSetup:
    """Load and check what a stage needs, then clear its folder. With `anew` the network is a new one."""
    start = loading.starting_thinker(config)
    loading.refuse_sharding(config, "a thinker")
    run = open_run(config, force, reads_text=False)
    thinker = _with_new_network(config, run.model, start) if anew else loading.inherit(config, start)
    folder = loading.pairs_folder(config)
    pairs_command = prerequisites.command(config, "trm_pairs")
    if not (folder / hidden_pairs.MANIFEST).is_file():
        raise UserError(f"{folder}: no finished hidden pairs: run `{pairs_command}`")
    train, heldout = (HiddenPairs(folder, split) for split in hidden_pairs.SPLITS)
    again = f"run `{pairs_command} --force`"
    loading.check_pairs(train.manifest, folder, thinker, run.tokenizer, again)
    loading.check_model(train.manifest, folder, run.model, again)
    for pairs in (train, heldout):
        pairs.check_ids(folder, run.model.config.vocab_size)
    surgery.freeze(thinker, config.training.freeze_names)
    if anew:
        whiten(thinker, train)
    run.begin()
    return StageSetup(run, thinker.to(run.world.device), train, heldout)


def _with_new_network(config: Config, model: PreTrainedModel, start: Path) -> LatentThinker:
    """A new thinker with the compressor of the one in `start`. Raises UserError if their sizes differ."""
    before, its = loading.load_thinker(start)
    settings, other = loading.settings_of(config), loading.settings_of(its)
    if settings.d_compressed not in (ThinkingConfig().d_compressed, other.d_compressed):
        raise UserError(
            f"thinking.d_compressed={settings.d_compressed}: the compressor in {start} has {other.d_compressed}"
        )
    settings.d_compressed, settings.objective = other.d_compressed, other.objective
    thinker = make_thinker(model, settings)
    if before.config.width != thinker.config.width:
        raise UserError(f"{start}: for hidden states of {before.config.width}, this model has {thinker.config.width}")
    thinker.compressor.load_state_dict(before.compressor.state_dict())
    return thinker


@torch.no_grad()
def whiten(thinker: LatentThinker, train: HiddenPairs) -> None:
    """Set the mean and the deviation of each axis to those of the compressed states of the first pairs."""
    rows = train.pairs[:WHITENED_PAIRS]
    codes = torch.cat([part.float() for pair in rows for part in (pair.prompt_states, pair.thoughts)])
    deviation, mean = torch.std_mean(codes, dim=0)
    thinker.mean.copy_(mean)
    thinker.deviation.copy_(deviation.clamp(min=1e-3 * deviation.max()))


def train_thinker(setup: StageSetup, objective: Objective, evaluate: Callable[[nn.Module], Figures]) -> Path:
    """Train on the hidden pairs; the folder of the thinker that is kept."""
    run, config = setup.run, setup.run.config
    stream = ShuffledStream(
        len(setup.train),
        setup.train.batch,
        identity={"hidden_pairs": setup.train.manifest.key},
        batch_size=config.training.batch_size,
        seed=config.seed,
        rank=run.world.rank,
        world_size=run.world.size,
        allow_changes=config.data.allow_changes,
    )
    return run.fit(setup.thinker, objective, stream=stream, evaluate=evaluate)


def spoken_accuracy(setup: StageSetup, speaker: Speaker) -> Callable[[nn.Module], Figures]:
    """An evaluation: how many held-out problems the language model answers rightly after the thinker's soft tokens."""
    longest = max(len(pair.answer_ids) for pair in setup.heldout.pairs)

    def evaluate(model: nn.Module) -> Figures:
        right = total = 0
        count, device = setup.run.config.training.eval_examples, setup.run.world.device
        for batch in setup.heldout.batches(HELDOUT_BATCH, count, device):
            right += sum(spoken_right(setup.thinker, speaker, batch, longest))
            total += len(batch["input_ids"])
        return {"eval_loss": 1 - right / total, "eval_accuracy": right / total}

    return evaluate


@torch.no_grad()
def spoken_right(thinker: LatentThinker, speaker: Speaker, batch: Batch, max_new_tokens: int) -> list[bool]:
    """Which problems of a batch of pairs are answered rightly."""
    prefix = speaker.prefill([prompt.tolist() for prompt in prompts_of(batch)])
    thoughts, soft_mask = thinker.think(*prompt_of(thinker, batch))
    said = speaker.answer(prefix, thinker.speak(thoughts), soft_mask, max_new_tokens)
    return [speaker.is_right(a, b.tolist()) for a, b in zip(said, answers_of(batch), strict=True)]


def report_stage(setup: StageSetup, final: Path, figures: Figures, by_steps: dict[int, float], following: str) -> Path:
    """Print and keep the figures of a stage; `following` is the next one."""
    config, out = setup.run.config, setup.run.out
    if setup.run.is_main:
        if config.training.max_steps:
            plot_runs([out / "training_log.csv"], out / "plots" / "loss.png")
        write_json(out / RESULTS, {**figures, "by_steps": by_steps})
        shown = {name.removeprefix("eval_"): value for name, value in figures.items()}
        print_table(["held-out pairs", "value"], [[name, f"{value:.4g}"] for name, value in shown.items()])
        print(f"\nwrote {out}/: final/ (thinker), training_log.csv, results.json")
        print(f"next: {prerequisites.command(config, following)}")
    return final
