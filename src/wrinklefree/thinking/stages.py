"""The stages of a thinker after its compressor, each from its config to its figures.

pairs       the language model thinks in words; its compressed hidden states are kept     thinking/pairs.py
recursion   the network learns to think what it thought                                   thinking/recursion.py
injection   the adapter learns to tell the language model                                 thinking/injection.py
grpo        what leads to right answers is reinforced                                     thinking/grpo.py
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core import surgery
from wrinklefree.core.errors import UserError
from wrinklefree.data import problems
from wrinklefree.data.kd_cache.manifest import model_fingerprint, tokenizer_fingerprint
from wrinklefree.data.problems import Problem
from wrinklefree.data.shuffled import ShuffledStream
from wrinklefree.data.stdlib import Split
from wrinklefree.distributed.world import World, barrier, gather, join_world, leave_world
from wrinklefree.methods.trm import LatentThinker
from wrinklefree.objectives.base import Batch, Objective
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.runs import prerequisites
from wrinklefree.runs.folder import make_run_folder, resume_point
from wrinklefree.thinking import hidden_pairs, loading, pairs
from wrinklefree.thinking.grpo import GRPO
from wrinklefree.thinking.hidden_pairs import HiddenPairs, Manifest
from wrinklefree.thinking.injection import Injection, fit_adapter, scale_adapter
from wrinklefree.thinking.recursion import Recursion, prompt_of, read_out
from wrinklefree.thinking.speech import Speaker, rows_of
from wrinklefree.tracking.plotting import plot_runs
from wrinklefree.tracking.terminal import print_table
from wrinklefree.training.loop import fit
from wrinklefree.training.plan import Plan, choose_length, make_plan

log = logging.getLogger("wrinklefree")

WHITENED_PAIRS = 2048  # that the mean and deviation of compressed states are taken from
HELDOUT_BATCH = 250

NO_START = "training.start_from: a value is required: the folder of the thinker to go on from"

Figures = dict[str, float]


class StageSetup(NamedTuple):
    """What every stage after the pairs works with."""

    config: Config
    world: World
    resume: Path | None
    plan: Plan
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    thinker: LatentThinker
    train: HiddenPairs
    heldout: HiddenPairs


def make_pairs(config: Config, force: bool) -> Path:
    """Write thoughts and hidden pairs into this experiment's folder; goes on where it was interrupted.

    Raises UserError where the folder has other pairs and `force` is not given, or a split comes out empty.
    """
    world = join_world()
    folder, settings = loading.pairs_folder(config), loading.method_of(config).pairs
    start = prerequisites.starting_folder(config)
    if start is None:
        raise UserError(NO_START)
    thinker = loading.inherit(config, start).to(world.device)
    model, tokenizer = loading.load_language_model(config)
    manifest = describe(config, model, tokenizer, thinker)
    if world.is_main:
        _claim(folder, manifest, force)
    barrier(world)
    found: dict[Split, list[Problem]] = {
        "train": problems.load(settings.problems, "train", settings.num_problems, settings.num_heldout),
        "heldout": problems.load(settings.problems, "heldout", settings.num_heldout, settings.num_heldout),
    }
    model.to(world.device)
    pairs.write_thoughts(pairs.Writer(model, tokenizer, settings), folder, found, config.seed, world)
    keep_pairs(pairs.Reader(model, tokenizer, thinker, settings), folder, found, manifest, world)
    if world.is_main:
        manifest.save(folder)
        _tell_pairs(folder, manifest, config)
    leave_world()
    return folder


def describe(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, thinker: LatentThinker
) -> Manifest:
    """What the pairs of this config are made of."""
    settings = vars(loading.method_of(config).pairs) | {
        "seed": config.seed,
        "max_thoughts": thinker.config.max_thoughts,
    }
    return Manifest(
        model=config.model.pretrained,
        model_fingerprint=model_fingerprint(model.state_dict()),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        compressor_fingerprint=loading.compressor_fingerprint(thinker),
        settings=settings,
        width=thinker.config.width,
        d_compressed=thinker.config.d_compressed,
    )


STARTED = "started.json"  # what the thoughts in a folder without a manifest are being made with


def _claim(folder: Path, manifest: Manifest, force: bool) -> None:
    """Make the folder, or find one that was begun with the same settings. Raises UserError for any other."""
    started = folder / STARTED
    if force and folder.exists():
        shutil.rmtree(folder)
    if not started.is_file() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty, and not hidden pairs; choose another output_root=... or experiment=...")
    if started.is_file() and json.loads(started.read_text())["key"] != manifest.key:
        raise UserError(
            f"{folder}: begun with another model, compressor or method.pairs.* settings: go on with those, choose "
            f"another experiment=..., or start over with --force"
        )
    folder.mkdir(parents=True, exist_ok=True)
    started.write_text(json.dumps({"key": manifest.key}) + "\n")


def keep_pairs(
    reader: pairs.Reader, folder: Path, found: dict[Split, list[Problem]], manifest: Manifest, world: World
) -> None:
    """Choose among the thoughts and write the shards of every split. Raises UserError for an empty one."""
    records = pairs.read_thoughts(folder)
    for split, listed in found.items():
        order = list(dict.fromkeys((split, problem.id) for problem in listed))
        kept, dropped = pairs.select(records, reader.config, order)
        manifest.counts[split] = len(kept)
        for why, number in dropped.items():
            manifest.dropped[why] = manifest.dropped.get(why, 0) + number
        if not kept:
            why = ", ".join(f"{number} {reason}" for reason, number in dropped.most_common())
            raise UserError(f"{folder}: no thought of the {split} split can be kept ({why or 'no problems'})")
        pairs.write_shards(reader, folder, split, kept, manifest.key, world)
    barrier(world)


def _tell_pairs(folder: Path, manifest: Manifest, config: Config) -> None:
    rows = [[f"{split} pairs", str(count)] for split, count in manifest.counts.items()]
    rows += [[f"dropped: {why}", str(count)] for why, count in manifest.dropped.items()]
    print_table(["hidden pairs", "number"], rows)
    print(f"\nwrote {folder}/: {hidden_pairs.MANIFEST}, thoughts-*.jsonl, shards")
    print(f"next: wf trm train model={config.model.name}")


def recursion(config: Config, force: bool) -> Path:
    """Train the network; leaves a thinker whose last thoughts the head reads."""
    setting = _open(config, force, anew=True)
    decoder, thinker = BodyAndHead(setting.model), setting.thinker
    count = config.training.eval_examples

    def evaluate(model: nn.Module) -> Figures:
        figures = read_out(thinker, decoder, setting.heldout, count)
        return {
            "eval_loss": figures.kl,
            "eval_accuracy": figures.accuracy,
            "eval_cosine": figures.cosine,
            "eval_halted": figures.halted,
        }

    objective = Recursion(thinker, decoder, loading.method_of(config).network)
    final = _train(setting, objective, evaluate)
    figures = read_out(thinker, decoder, setting.heldout, count)._asdict()
    return _tell(setting, final, {k: v for k, v in figures.items() if k != "by_steps"}, figures["by_steps"], "inject")


def injection(config: Config, force: bool) -> Path:
    """Train the adapter; leaves a thinker whose thoughts the language model answers from."""
    setting = _open(config, force)
    speaker, given = Speaker(setting.model, setting.tokenizer), loading.method_of(config).injection
    if setting.resume is None and given.init == "least_squares":
        fit_adapter(setting.thinker, speaker, setting.train, given.fitted_pairs)
    elif setting.resume is None:
        scale_adapter(setting.thinker, speaker, setting.train)
    final = _train(setting, Injection(setting.thinker, speaker, given), _spoken(setting, speaker))
    return _tell(setting, final, _spoken(setting, speaker)(setting.thinker), {}, "grpo")


def grpo(config: Config, force: bool) -> Path:
    """Reinforce what leads to right answers; the start is kept where nothing is better."""
    setting = _open(config, force)
    speaker, given = Speaker(setting.model, setting.tokenizer), loading.method_of(config).grpo
    if given.trains == "adapter":
        setting.thinker.network.requires_grad_(False)
    else:
        setting.thinker.keep_average()
    final = _train(setting, GRPO(setting.thinker, speaker, given), _spoken(setting, speaker))
    return _tell(setting, final, _spoken(setting, speaker)(setting.thinker), {}, "eval")


def _open(config: Config, force: bool, anew: bool = False) -> StageSetup:
    """Everything a stage needs, checked; the folder is cleared last. With `anew` the network is a new one."""
    world = join_world()
    resume = resume_point(config, force) if world.is_main else None
    resume = gather(resume, world)[0]
    torch.manual_seed(config.seed)
    start = prerequisites.starting_folder(config)
    if start is None:
        raise UserError(NO_START)
    model, tokenizer = loading.load_language_model(config)
    thinker = _new_network(config, model, start) if anew else loading.inherit(config, start)
    folder = loading.pairs_folder(config)
    train, heldout = (HiddenPairs(folder, split) for split in hidden_pairs.SPLITS)
    loading.check_pairs(train.manifest, folder, thinker, tokenizer)
    loading.check_model(train.manifest, folder, model)
    choose_length(config, model)
    plan = make_plan(config, model, world)
    surgery.freeze(thinker, config.training.freeze_names)
    if anew:
        whiten(thinker, train)
    if world.is_main and resume is None:
        make_run_folder(config)
    model.to(world.device)
    return StageSetup(config, world, resume, plan, model, tokenizer, thinker.to(world.device), train, heldout)


def _new_network(config: Config, model: PreTrainedModel, start: Path) -> LatentThinker:
    """A thinker with the compressor of the one in `start`. Raises UserError where the sizes differ."""
    before, made = loading.load_thinker(start)
    method, other = loading.method_of(config), loading.method_of(made)
    if method.d_compressed not in (type(method)().d_compressed, other.d_compressed):
        raise UserError(
            f"method.d_compressed={method.d_compressed}: the compressor in {start} has {other.d_compressed}"
        )
    method.d_compressed, method.objective = other.d_compressed, other.objective
    thinker = method.prepare(model)
    assert isinstance(thinker, LatentThinker)
    if before.config.width != thinker.config.width:
        raise UserError(f"{start}: for hidden states of {before.config.width}, this model has {thinker.config.width}")
    thinker.compressor.load_state_dict(before.compressor.state_dict())
    return thinker


@torch.no_grad()
def whiten(thinker: LatentThinker, train: HiddenPairs) -> None:
    """Set mean and deviation of each axis from what was compressed of the first pairs."""
    rows = train.pairs[:WHITENED_PAIRS]
    codes = torch.cat([part.float() for pair in rows for part in (pair.prompt_states, pair.thoughts)])
    deviation, mean = torch.std_mean(codes, dim=0)
    thinker.mean.copy_(mean)
    thinker.deviation.copy_(deviation.clamp(min=1e-3 * deviation.max()))


def _train(setting: StageSetup, objective: Objective, evaluate: Callable[[nn.Module], Figures]) -> Path:
    config, plan = setting.config, setting.plan
    stream = ShuffledStream(
        len(setting.train),
        setting.train.batch,
        identity={"hidden_pairs": setting.train.manifest.key},
        batch_size=config.training.batch_size,
        seed=config.seed,
        rank=setting.world.rank,
        world_size=setting.world.size,
    )
    return fit(
        setting.thinker,
        objective,
        stream,
        config,
        plan,
        tokenizer=setting.tokenizer,
        world=setting.world,
        evaluate=evaluate,
        resume=setting.resume,
    )


def _spoken(setting: StageSetup, speaker: Speaker) -> Callable[[nn.Module], Figures]:
    """Measures how many held-out problems the language model answers rightly after the thinker's soft tokens."""
    longest = max(len(pair.answer_ids) for pair in setting.heldout.pairs)

    def evaluate(model: nn.Module) -> Figures:
        right = total = 0
        for held in setting.heldout.batches(HELDOUT_BATCH, setting.config.training.eval_examples):
            batch = {name: tensor.to(setting.world.device) for name, tensor in held.items()}
            right += sum(spoken_right(setting.thinker, speaker, batch, longest))
            total += len(batch["input_ids"])
        return {"eval_loss": 1 - right / total, "eval_accuracy": right / total}

    return evaluate


@torch.no_grad()
def spoken_right(thinker: LatentThinker, speaker: Speaker, batch: Batch, max_new_tokens: int) -> list[bool]:
    """Which problems of a batch of pairs are answered rightly."""
    prefix = speaker.prefill([row.tolist() for row in rows_of(batch["input_ids"], batch["prompt_length"])])
    thoughts, made = thinker.think(*prompt_of(thinker, batch))
    said = speaker.answer(prefix, thinker.speak(thoughts), made, max_new_tokens)
    gold = rows_of(batch["answer_ids"], batch["answer_length"])
    decode = speaker.tokenizer.decode
    return [
        problems.same_answer(decode(a, skip_special_tokens=True), decode(b, skip_special_tokens=True))
        for a, b in zip(said, gold, strict=True)
    ]


def _tell(setting: StageSetup, final: Path, figures: Figures, by_steps: dict[int, float], following: str) -> Path:
    """Print and keep what the stage came to."""
    config, out = setting.config, Path(setting.config.output_dir)
    if setting.world.is_main:
        if config.training.max_steps:
            plot_runs([out / "training_log.csv"], out / "plots" / "loss.png")
        (out / "results.json").write_text(json.dumps({**figures, "by_steps": by_steps}, indent=2) + "\n")
        shown = {name.removeprefix("eval_"): value for name, value in figures.items()}
        print_table(["held-out pairs", "value"], [[name, f"{value:.4g}"] for name, value in shown.items()])
        print(f"\nwrote {out}/: final/ (thinker), training_log.csv, results.json")
        print(f"next: wf trm {following} model={config.model.name}")
    leave_world()
    return final
