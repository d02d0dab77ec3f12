"""Checkpoint folders: a Hugging Face folder, the resolved config, and the trainer's state.

    step_N/  model.safetensors  config.json  generation_config.json  tokenizer files
             wrinklefree.yaml           the resolved config, enough to rebuild the model
             state/                     the trainer's state, see saved_state.py

A folder is written under a temporary name, flushed to disk and renamed, so every `step_N` is whole.
A run may resume with another number of processes: weights are stored whole, and shards carry their place in the whole.
"""

import copy
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from wrinklefree.core.errors import UserError
from wrinklefree.core.files import aside_of, full_disk_said, write_json, written_aside
from wrinklefree.core.numbers import not_numbers
from wrinklefree.core.stack import as_one, masters
from wrinklefree.distributed import sharding
from wrinklefree.distributed.world import ALONE, World, barrier
from wrinklefree.training import storage
from wrinklefree.training.saved_state import TRAINER, State, save_state

CONFIG = "wrinklefree.yaml"

WEIGHTS = "model.safetensors"

PROGRESS = "progress.json"

ONE_FILE = 2**63 - 1  # bytes: more than any file holds, so that weights are never spread over several


@contextmanager
def _written_together(path: Path, world: World) -> Iterator[Path]:
    """Give every process the same temporary folder to write into, and rename it to `path` once all are done."""
    if world.is_main:
        with written_aside(path) as aside:
            barrier(world)  # the folder is there
            yield aside
            barrier(world)  # all parts are written
    else:
        barrier(world)
        aside = aside_of(path)
        elsewhere = not aside.is_dir()  # on another machine, whose disk is another one
        with full_disk_said(path):
            yield aside
        barrier(world)
        if elsewhere:
            shutil.rmtree(aside, ignore_errors=True)
    barrier(world)  # renamed


def save(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: str,
    state: State | None,
    world: World = ALONE,
    progress: Mapping[str, float] | None = None,
) -> None:
    """Write a checkpoint folder; `settings` is the resolved config as YAML.

    Every process has to call this, because a sharded model is gathered on the main one.
    Without `state` the folder can be loaded and exported, but not resumed from. `progress` goes to `progress.json`.
    The file's names and shapes are read back. Raises UserError if they are not the model's, and leaves no folder then.
    """
    weights = as_one(sharding.whole_state(model, world), model)
    with _written_together(path, world) as aside:
        if world.is_main:
            # Without this, transformers 5 renames the weights of experts and of GPT-NeoX to what their hub files have.
            model.save_pretrained(aside, state_dict=weights, save_original_format=False, max_shard_size=ONE_FILE)
            _check_written(path, aside / WEIGHTS, model)
            tokenizer.save_pretrained(aside)
            (aside / CONFIG).write_text(settings)
            if progress is not None:
                write_progress(aside, progress)
        if state is not None:
            save_state(aside, state, world)


def write_progress(folder: Path, progress: Mapping[str, float]) -> None:
    """Write where in its run the model in `folder` is from."""
    write_json(folder / PROGRESS, dict(progress))


def step_folders(folder: Path) -> list[Path]:
    """Return the `step_N` folders in `folder`, oldest first."""
    return sorted((p for p in folder.glob("step_*") if is_step(p.name)), key=step_of)


def is_step(name: str) -> bool:
    """Whether `name` is that of a checkpoint, `step_N`."""
    return name.startswith("step_") and name.removeprefix("step_").isdigit()


def number_of(name: str) -> int:
    """The N of `step_N`."""
    return int(name.removeprefix("step_"))


def step_of(path: Path) -> int:
    """The number in the name of a `step_N` folder."""
    return number_of(path.name)


def prune(folder: Path, keep: int, spare: Collection[str] = ()) -> None:
    """Remove all but the newest `keep` checkpoints, and of those whose names are in `spare` the newest `keep` more."""
    old = step_folders(folder)[:-keep]
    spared = [path for path in old if path.name in spare][-keep:]
    for path in old:
        if path not in spared:
            shutil.rmtree(path)


def find_checkpoint(resume_from: str, run: Path) -> Path:
    """Return the checkpoint folder that `resume_from` names. Raises UserError if there is none.

    | `resume_from` | checkpoint |
    |---|---|
    | `latest` | the newest one in the run folder `run` |
    | a checkpoint folder | this one |
    | a run folder | the newest one in it |
    | `scheme://...` | as for a folder, once it has been copied here |
    | `latest,OTHER` | the newest one in the run folder, or if it has none, what OTHER names |
    """
    first, comma, other = resume_from.partition(",")
    if comma:
        there = first == "latest" and step_folders(run / "checkpoints")
        return find_checkpoint(first if there else other, run)
    name = resume_from.removesuffix(".pt")  # the training guide writes step_N.pt
    path = run if name == "latest" else storage.fetch(name)
    if (path / TRAINER).is_file():
        return path
    steps = step_folders(path / "checkpoints") or step_folders(path)
    if not steps:
        raise UserError(f"resume_from={resume_from}: no checkpoint with {TRAINER} in {path}")
    return steps[-1]


@torch.no_grad()
def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a prepared model. If it is sharded, each process takes its own share.

    Raises UserError if a name or shape differs between file and model, naming the first one, and for NaN.
    """
    file = path / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: missing; this is not a whole checkpoint")
    own = model.state_dict()
    try:
        with safe_open(file, framework="pt") as tensors:
            shapes, read = _contents(tensors, model)
            if _misfits(shapes, own, model) and isinstance(model, PreTrainedModel):
                converted = _converted({name: read(name) for name in shapes}, model)
                shapes, read = {n: tuple(t.shape) for n, t in converted.items()}, converted.__getitem__
            _check_fit(file, shapes, own, model)
            for name in shapes:
                tensor = read(name)
                if own[name].is_floating_point() and not_numbers(tensor):
                    raise UserError(f"{file}: {name} {not_numbers(tensor)}")
                own[name].copy_(sharding.like(tensor, own[name]))
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not safetensors ({error})") from error


def _contents(tensors: Any, model: nn.Module) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Return names and shapes from the header of an open file, and a function that reads a tensor by its name.

    Experts that are one tensor in the file have the names of the model's layers.
    """
    shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    parts: dict[str, tuple[str, int]] = {}
    for fqn, names in masters(model).items():
        if shapes.get(fqn, ())[:1] == (len(names),):
            shapes |= dict.fromkeys(names, shapes.pop(fqn)[1:])
            parts |= {name: (fqn, number) for number, name in enumerate(names)}

    def read(name: str) -> Tensor:
        if name not in parts:
            return tensors.get_tensor(name)
        fqn, number = parts[name]
        return tensors.get_slice(fqn)[number]

    return shapes, read


def _converted(state: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return weights that have the names of hub files under the model's names, or `state` itself if that fails.

    Version 0.1 saved models with experts and GPT-NeoX under these names. A method's own parameters keep theirs.
    """
    if not get_model_conversion_mapping(model, add_legacy=False):
        return state
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    options = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    plain, info = type(model).from_pretrained(
        None, config=config, state_dict=dict(state), trust_remote_code=False, **options
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        return state
    return plain.state_dict() | {name: state[name] for name in info["unexpected_keys"] & state.keys()}


def _check_written(path: Path, file: Path, model: nn.Module) -> None:
    """Raises UserError if `file`, which was just written for the checkpoint `path`, does not fit the model."""
    with safe_open(file, framework="pt") as tensors:
        wrong = _misfits(_contents(tensors, model)[0], model.state_dict(), model)
    if wrong:
        raise UserError(
            f"{path}: nobody could load this checkpoint, because transformers {transformers.__version__} wrote other "
            f"weights than {type(model).__name__} has: {wrong[0]} ({len(wrong)} in all); try another version of it"
        )


def _check_fit(file: Path, shapes: dict[str, tuple[int, ...]], own: dict[str, Tensor], model: nn.Module) -> None:
    """Raises UserError if the file's names or shapes are not the model's."""
    wrong = _misfits(shapes, own, model)
    if wrong:
        raise UserError(f"{file}: does not fit this model and method; first mismatch: {wrong[0]} ({len(wrong)} in all)")


def _misfits(shapes: dict[str, tuple[int, ...]], own: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Return the names that only the file or only the model has, and those with another shape in the file."""
    aliases = {name for names in _tied(model) if names & shapes.keys() for name in names}
    wrong = sorted((own.keys() - shapes.keys() - aliases) | (shapes.keys() - own.keys()))
    return wrong + sorted(n for n in shapes.keys() & own.keys() if shapes[n] != tuple(own[n].shape))


def _tied(model: nn.Module) -> list[set[str]]:
    """Return sets of names that share one parameter. A tied weight is stored under one of its names."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]
