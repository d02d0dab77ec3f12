"""A training run of seconds: a toy Llama saved to a folder, text of its own words, the settings to train it."""

import csv
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from tiny import VOCAB, llama, tokenizer
from torch import nn
from transformers import PreTrainedModel

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.distributed.world import World
from wrinklefree.objectives.base import Objective
from wrinklefree.runs.setup import open_run
from wrinklefree.runs.stage import choose_objective, prepare_student

CPU = World(0, 1, torch.device("cpu"))
CLOCKS = ("elapsed_sec", "tokens_per_sec")  # the columns that no two runs share


def toy_files(folder: Path, toy: PreTrainedModel | None = None) -> tuple[Path, Path]:
    """A model folder and a folder of text."""
    model, text = folder / "toy", folder / "text"
    (toy or llama()).save_pretrained(model)
    tokenizer().save_pretrained(model)
    text.mkdir()
    for number in range(60):  # the next word is mostly the next number
        words = (7 * number + place + place // 5 for place in range(40))
        (text / f"{number:02}.txt").write_text(" ".join(f"w{word % (VOCAB - 2)}" for word in words))
    return model, text


def overrides(folder: Path, *more: str) -> list[str]:
    """Settings of a run in `folder`, where `toy_files` has been: 6 steps, everything logged."""
    values = {"max_steps": 6, "batch_size": 2, "max_seq_length": 16, "lr": 1e-3, "precision": "fp32"}
    values |= {"scheduler.name": "wsd", "optimizer.scale_lr": 5e-4}  # not those of `model=FOLDER`
    values |= {"start": "plain", "blockwise.enabled": "false"}  # tests/reconstruction is about these
    values |= {"log_interval": 1, "eval_interval": 2, "eval_tokens": 64, "final_eval_tokens": 64}
    return [
        f"model={folder / 'toy'}",
        "training=fairy2_w2",
        "data=local",
        f"data.path={folder / 'text'}",
        f"output_dir={folder / 'run'}",
        *(f"training.{key}={value}" for key, value in values.items()),
        *more,
    ]


def resolved(folder: Path, *more: str) -> Config:
    return load_config(overrides(folder, *more))


def run(
    config: Config,
    *,
    on_step: Callable[[nn.Module, int], None] | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    objective: Callable[[PreTrainedModel, PreTrainedModel], Objective] | None = None,
    world: World = CPU,
    force: bool = False,
    forecast: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> PreTrainedModel:
    """What `wf train` does between loading and packing; returns the trained model."""
    with open_run(config, force, world=world, clock=clock) as opened:
        opened.begin()
        teacher, student = opened.model, prepare_student(config, opened.model)
        made = (objective or partial(choose_objective, config))(student, teacher)
        for model in (student, teacher):
            opened.placement.place(model)
        opened.fit(student, made, teacher=teacher, evaluate=evaluate, on_step=on_step, forecast=forecast)
        return student


def rows(run_folder: Path) -> list[dict[str, str]]:
    """The log without clocks."""
    with (run_folder / "training_log.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)]


def tensors(tree: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a nested state."""
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{path}.{key}")
    elif isinstance(tree, list | tuple):
        for key, value in enumerate(tree):
            yield from tensors(value, f"{path}.{key}")
