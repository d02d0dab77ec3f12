"""`wf trm pairs` from its config to its figures: the model writes thoughts, then reads them back as hidden pairs."""

from contextlib import nullcontext
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.schema import Config
from wrinklefree.core import replaced
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.core.fingerprint import model_fingerprint
from wrinklefree.core.lock import locked
from wrinklefree.data import problems
from wrinklefree.data.problems import Problem
from wrinklefree.data.sources import Split
from wrinklefree.data.tokenizer import tokenizer_fingerprint
from wrinklefree.distributed.world import World, barrier, join_world, leave_world
from wrinklefree.runs import prerequisites
from wrinklefree.thinking import hidden_pairs, loading, pairs
from wrinklefree.thinking.hidden_pairs import Manifest
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.tracking.terminal import print_table

STARTED = "started.json"  # the key of the pairs, from the first thought on; the manifest comes last

# What `--force` replaces. The shards are `SPLIT-NNNNN.safetensors`.
OWN = (STARTED, hidden_pairs.MANIFEST, "thoughts-*.jsonl", "*-*.safetensors")


def make_pairs(config: Config, force: bool) -> Path:
    """Write thoughts and hidden pairs into this experiment's folder; an interrupted run goes on with what is missing.

    Raises UserError if the folder has other pairs and `force` is not given, or if no thought of a split can be kept.
    """
    world = join_world()
    folder, settings = loading.pairs_folder(config), loading.settings_of(config).pairs
    thinker = loading.inherit(config, loading.starting_thinker(config)).to(world.device)
    model, tokenizer = loading.load_language_model(config)
    manifest = describe_pairs(config, model, tokenizer, thinker)
    found: dict[Split, list[Problem]] = {
        "train": problems.load_problems(settings.problems, "train", settings.num_problems, settings.num_heldout),
        "heldout": problems.load_problems(settings.problems, "heldout", settings.num_heldout, settings.num_heldout),
    }
    model.to(world.device)
    with locked(folder) if world.is_main else nullcontext():
        if world.is_main:
            _claim_folder(folder, manifest, force)
        barrier(world)
        pairs.write_thoughts(pairs.Writer(model, tokenizer, settings), folder, found, config.seed, world)
        if world.is_main:
            replaced.let_go(folder)
        keep_pairs(pairs.Reader(model, tokenizer, thinker, settings), folder, found, manifest, world)
        if world.is_main:
            manifest.save(folder)
            _report(folder, manifest, config)
    leave_world()
    return folder


def describe_pairs(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, thinker: LatentThinker
) -> Manifest:
    """The manifest of the pairs that this config makes, without their numbers."""
    settings = vars(loading.settings_of(config).pairs) | {
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


def _claim_folder(folder: Path, manifest: Manifest, force: bool) -> None:
    """Begin pairs, or find that the same settings began them. Raises UserError for a folder of anything else."""
    started = folder / STARTED
    # A run with `--force` may have been killed before it had written a thought.
    new = [started] if started.is_file() else []
    replaced.settle(folder, new, saved=any(folder.glob("thoughts-*.jsonl")))
    if force and started.is_file():
        replaced.set_aside(folder, [path for pattern in OWN for path in folder.glob(pattern)])
    elif not started.is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: not empty, and not hidden pairs; choose another output_root=... or experiment=...")
    if started.is_file() and read_json(started) != {"key": manifest.key}:
        raise UserError(
            f"{folder}: begun with another model, compressor or thinking.pairs.* settings: go on with those, choose "
            f"another experiment=..., or start over with --force"
        )
    write_json(started, {"key": manifest.key})


def keep_pairs(
    reader: pairs.Reader, folder: Path, found: dict[Split, list[Problem]], manifest: Manifest, world: World
) -> None:
    """Choose among the thoughts and write the shards of every split. Raises UserError for a split without any."""
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


def _report(folder: Path, manifest: Manifest, config: Config) -> None:
    rows = [[f"{split} pairs", str(count)] for split, count in manifest.counts.items()]
    rows += [[f"dropped: {why}", str(count)] for why, count in manifest.dropped.items()]
    print_table(["hidden pairs", "number"], rows)
    print(f"\nwrote {folder}/: {hidden_pairs.MANIFEST}, thoughts-*.jsonl, shards")
    print(f"next: {prerequisites.command(config, 'trm_recursion')}")
