"""The trainer's state in a checkpoint folder: optimizers, step, data position, random numbers.

state/shards/              moments of sharded parameters, one safetensors file per process
state/trainer.pt           all else
"""

import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from wrinklefree.core.errors import UserError
from wrinklefree.core.numbers import not_numbers
from wrinklefree.distributed import sharding
from wrinklefree.distributed.world import World, gather
from wrinklefree.training.budget import EVALUATION, SAVE, STEP

State = dict[str, Any]

TRAINER = "state/trainer.pt"

SHARDS = "state/shards"

PIECE = 1 << 26  # bytes of a file that travel together between machines


def save_state(folder: Path, state: State, world: World) -> None:
    """Write this process's shards. The main process also writes everything that is not sharded."""
    shards, optimizers = _split(state["optimizers"])
    if shards:
        _save_shards(folder / SHARDS, shards)
        collect(folder / SHARDS, world)
    if world.is_main:
        (folder / TRAINER).parent.mkdir(exist_ok=True)
        with (folder / TRAINER).open("wb") as file:  # called with a path, torch.save hides why it failed
            torch.save(state | {"optimizers": optimizers, "shards": sorted(shards)}, file)


def _split(optimizers: list[State]) -> tuple[dict[str, Tensor], list[State]]:
    """Take the sharded tensors out of the optimizers' states. Returns them by name, and the states without them.

    A name is `optimizer.parameter.moment`, such as `0.17.exp_avg`: two numbers and torch's name of the moment.
    """
    shards: dict[str, Tensor] = {}
    rest = []
    for number, optimizer in enumerate(optimizers):
        kept: dict[int, State] = {}
        for index, moments in optimizer["state"].items():
            sharded = {name: value for name, value in moments.items() if isinstance(value, DTensor)}
            shards |= {f"{number}.{index}.{name}": value for name, value in sharded.items()}
            kept[index] = {name: value for name, value in moments.items() if name not in sharded}
        rest.append(optimizer | {"state": kept})
    return shards, rest


def _save_shards(folder: Path, shards: dict[str, Tensor]) -> None:
    # safetensors, whose headers are JSON: torch's own format pickles its metadata, and a pickle can run code.
    try:
        save_shards(shards, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # raised on every process; it holds each one's failure
        raise next(iter(error.failures.values()))[0] from error


def collect(folder: Path, world: World) -> None:
    """Send the files in `folder` of other machines to the main process's. Every process has to call this.

    On one machine, or on a disk that all machines share, the main process has them already.
    """
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*")) if path.is_file()}
    listed = gather(files, world)
    there = dict(listed[0])
    for rank, names in enumerate(listed):
        for name, size in names.items():
            if name not in there:
                there[name] = size
                _send(folder / name, size, rank, world)


def _send(file: Path, size: int, rank: int, world: World) -> None:
    """Copy a file from process `rank` to the main process, in pieces."""
    if world.rank not in (0, rank):
        return
    with file.open("rb" if world.rank else "wb") as handle:
        for start in range(0, size, PIECE):
            piece = torch.empty(min(PIECE, size - start), dtype=torch.uint8)
            if world.rank:
                piece = torch.frombuffer(bytearray(handle.read(len(piece))), dtype=torch.uint8)
                dist.send(piece, dst=0)
            else:
                dist.recv(piece, src=rank)
                handle.write(piece.numpy().tobytes())


def load_state(path: Path) -> State:
    """Read the trainer's state. Raises UserError if it is missing or broken."""
    file = path / TRAINER
    try:
        state: State = torch.load(file, map_location="cpu", weights_only=True)  # a full unpickling could run code
    except FileNotFoundError as error:
        raise UserError(f"{file}: missing; this checkpoint cannot be resumed from") from error
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: truncated or not a trainer state") from error
    _check_state(file, state)
    return state


# What the trainer's state holds at least, and of which type.
PARTS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "tokens": int,
    "best_loss": (int, float),
    "optimizers": list,
    "stream": dict,
    "rng": list,
    "shards": list,
}


def _check_state(file: Path, state: Any) -> None:
    """Raises UserError if the trainer's state lacks a part, or one has another type or NaN in it."""
    if not isinstance(state, dict):
        raise UserError(f"{file}: not a trainer state")
    wrong = [key for key, kind in PARTS.items() if not isinstance(state.get(key), kind)]
    wrong += [key for key in ("step", "tokens") if key not in wrong and state[key] < 0]
    if wrong:
        raise UserError(f"{file}: not a trainer state ({wrong[0]} is missing, or not of its kind)")
    if not state["rng"] or not all(isinstance(one, Tensor) and one.dtype == torch.uint8 for one in state["rng"]):
        raise UserError(f"{file}: not a trainer state (rng holds no states of random numbers)")
    if state.get("budget") is not None and not _is_budget(state["budget"]):
        raise UserError(f"{file}: not a trainer state (budget is not as it was saved)")
    for optimizer in state["optimizers"]:
        _check_optimizer(file, optimizer)


# What a budget keeps: numbers that are not below 0, and the plan.
BUDGET = ("minutes", "seconds", "trained", "last_step", "tokens_per_step", "max_steps")


def _is_budget(values: Any) -> bool:
    """Whether `values` has the form of a budget's state, with numbers that a budget may have."""
    if not isinstance(values, dict) or not isinstance(values.get("means"), dict) or "command" not in values:
        return False
    bend, means = values.get("bend"), values["means"]
    if not isinstance(bend, list) or len(bend) != 2 or not {STEP, EVALUATION, SAVE} <= means.keys():
        return False
    numbers = [*(values.get(name) for name in BUDGET), *bend, *means.values()]
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        return False
    return bool(means[STEP] > 0 and values["tokens_per_step"] > 0 and bend[0] < values["max_steps"])


def _check_optimizer(file: Path, optimizer: Any) -> None:
    """Raises UserError if an optimizer's state has another form than torch saves, or NaN in it."""
    if not _is_optimizer(optimizer):
        raise UserError(f"{file}: not a trainer state (optimizers are not as torch saves them)")
    for index, moments in optimizer["state"].items():
        for name, value in moments.items():
            if name == "step" and (torch.as_tensor(value) < 0).any():  # torch divides by 1 - beta^(step + 1)
                raise UserError(f"{file}: step of parameter {index} is below 0")
            if isinstance(value, Tensor) and not_numbers(value):
                raise UserError(f"{file}: {name} of parameter {index} {not_numbers(value)}")


def _is_optimizer(values: Any) -> bool:
    """Whether `values` has the form of an optimizer's state."""
    if not isinstance(values, dict) or not isinstance(values.get("state"), dict):
        return False
    groups = values.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return False
    listed = [group.get("params") for group in groups]
    if not all(isinstance(numbers, list) and all(type(n) is int for n in numbers) for numbers in listed):
        return False
    moments = values["state"].values()
    kinds = (Tensor, int, float)
    return all(isinstance(one, dict) and all(isinstance(value, kinds) for value in one.values()) for one in moments)


def place_moments(path: Path, state: State, optimizers: list[Optimizer]) -> None:
    """Move the optimizers' tensors in `state` to their parameters' devices, and shard them if the parameters are.

    `state` comes from `load_state` and is changed in place.
    Raises ValueError if the optimizers have other groups than the saved ones, UserError if shards are broken.
    """
    places: dict[str, Tensor] = {}
    for number, (optimizer, saved) in enumerate(zip(optimizers, state["optimizers"], strict=True)):
        sizes = [
            [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved["param_groups"])
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(f"groups of {sizes[1]} parameters, not {sizes[0]}")
        for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            places[f"{number}.{index}"] = parameter
            moments = saved["state"].get(index, {})
            _check_moments(path, moments, parameter)
            moments.update({name: sharding.like(value, parameter) for name, value in moments.items()})
    wanted = {key: torch.empty_like(places[key.rpartition(".")[0]]) for key in state["shards"]}
    if wanted:
        _load_shards(path / SHARDS, wanted)
    for key, tensor in wanted.items():
        number, index, name = key.split(".")
        state["optimizers"][int(number)]["state"][int(index)][name] = tensor


def _check_moments(path: Path, moments: State, parameter: Tensor) -> None:
    """Raises UserError if a moment has neither one number nor the parameter's shape."""
    for name, value in moments.items():
        if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
            raise UserError(
                f"{path / TRAINER}: {name} is {list(value.shape)}, its parameter {list(parameter.shape)}: "
                f"saved with another model, or damaged"
            )


def _load_shards(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill the tensors in `wanted`, whole or sharded, from shards that any number of processes wrote."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # no_dist says so already
            reader = HuggingFaceStorageReader(str(folder))
            load_shards(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except (CheckpointException, OSError) as error:
        raise UserError(f"{folder}: shards are missing, truncated or of another run") from error
