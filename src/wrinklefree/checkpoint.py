"""Checkpoint folders: an ordinary Hugging Face folder, the resolved config, and the state to go on from.

    step_N/  model.safetensors  config.json  generation_config.json  tokenizer files
             wrinklefree.yaml           the resolved config, enough to rebuild the model
             state/trainer.pt           optimizers, step, data position, random numbers; read with weights_only=True

A folder is written under a temporary name beside its place, flushed to disk and renamed, so the newest checkpoint is
always a whole one, whatever stops the writing.
"""

import errno
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree import config as configs
from wrinklefree.core.errors import UserError

State = dict[str, Any]

CONFIG = "wrinklefree.yaml"
WEIGHTS = "model.safetensors"
TRAINER = "state/trainer.pt"

FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary sibling folder to write into; renamed to `path` when the block ends well, removed when it does not.

    An existing `path` is replaced only after the new folder is whole. Raises UserError when the disk is full.
    """
    aside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _flush(aside)
        _replace(aside, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if _disk_full(error):
            raise UserError(
                f"disk full while writing {path}: free some space; earlier checkpoints are untouched"
            ) from error
        raise
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _disk_full(error: BaseException) -> bool:
    """safetensors hands the operating system's error on as text alone, torch.save as the context of another error."""
    if isinstance(error, OSError):
        return error.errno in FULL
    if isinstance(error.__context__, OSError):
        return _disk_full(error.__context__)
    return any(f"(os error {code})" in str(error) for code in FULL)


def _flush(folder: Path) -> None:
    """Force every file to the disk: a rename must not become durable before the content."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _replace(aside: Path, path: Path) -> None:
    if not path.exists():
        aside.rename(path)
        return
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    aside.rename(path)
    shutil.rmtree(old)


def save(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: configs.Config, state: State | None
) -> None:
    """Write a checkpoint folder; without `state` it can be loaded and exported, but not resumed from."""
    with written_aside(path) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        (aside / CONFIG).write_text(configs.to_yaml(config))
        if state is not None:
            (aside / TRAINER).parent.mkdir()
            with (aside / TRAINER).open("wb") as file:  # given a path, torch.save does not say why it failed
                torch.save(state, file)


def step_folders(folder: Path) -> list[Path]:
    """The `step_N` folders in `folder`, oldest first."""
    steps = [p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit()]
    return sorted(steps, key=lambda p: int(p.name.removeprefix("step_")))


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in step_folders(folder)[:-keep]:
        shutil.rmtree(path)


def find(resume_from: str, run: Path, fetch: Callable[[str], Path]) -> Path:
    """The checkpoint folder that `resume_from` names: `latest`, a folder, a run folder, or a URL that `fetch` copies.

    `step_N.pt`, as the guide writes it, is the folder `step_N`. Raises UserError where there is none.
    """
    name = resume_from.removesuffix(".pt")
    path = run if name == "latest" else fetch(name) if "://" in name else Path(name)
    if (path / TRAINER).is_file():
        return path
    steps = step_folders(path / "checkpoints") or step_folders(path)
    if not steps:
        raise UserError(f"resume_from={resume_from}: no checkpoint with {TRAINER} in {path}")
    return steps[-1]


def load_weights(path: Path, model: nn.Module) -> None:
    """Load a checkpoint's weights into a prepared model, strictly. Raises UserError naming what does not fit."""
    file = path / WEIGHTS
    if not file.is_file():
        raise UserError(f"{file}: missing; this is not a whole checkpoint")
    try:
        with safe_open(file, framework="pt") as tensors:
            stored = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{file}: truncated or not safetensors ({error})") from error
    own = model.state_dict()
    aliases = {name for names in _tied(own) if names & stored.keys() for name in names}
    wrong = sorted((own.keys() - stored.keys() - aliases) | (stored.keys() - own.keys()))
    wrong += sorted(n for n in stored.keys() & own.keys() if stored[n].shape != own[n].shape)
    if wrong:
        raise UserError(f"{file}: does not fit this model and method; first mismatch: {wrong[0]} ({len(wrong)} in all)")
    model.load_state_dict(stored, strict=False)


def _tied(state: dict[str, torch.Tensor]) -> list[set[str]]:
    """Names that share memory: tied weights are stored once."""
    groups: dict[int, set[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(tensor.data_ptr(), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]


def load_state(path: Path) -> State:
    """The trainer's state. Raises UserError where it is missing or broken."""
    file = path / TRAINER
    try:
        state: State = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; this checkpoint cannot be resumed from") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: truncated or not a trainer state") from error
    return state
