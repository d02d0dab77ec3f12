"""Mixed precision: how much each layer suffers from few bits, and the best choice of bits within a number of bytes.

    damage(l, v)   the KL to the original, nats per token, if layer l alone is quantized with the value v of the
                   method's ladder (such as 2 stages), and all others are in full precision. Layers with the same
                   input, such as q, k and v, count as one
    chosen         v_l with  sum_l bytes(l, v_l) <= budget  and the least  sum_l damage(l, v_l)

Damages of layers add up as long as they are small. The sum is minimized exactly but for the bytes, which are rounded up
to a `BUCKETS`th of the budget: dynamic programming over layers and bytes. `even` is the choice to hold it against: it
has the same bytes, and does not look at what the layers are.
"""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from wrinklefree.compare import references
from wrinklefree.compare.quality import first_rows
from wrinklefree.config.schema import Config
from wrinklefree.core.batch import model_inputs
from wrinklefree.core.effective import EffectiveWeight
from wrinklefree.core.errors import UserError
from wrinklefree.core.files import read_json, write_json
from wrinklefree.core.fingerprint import fingerprint, model_fingerprint
from wrinklefree.core.method import QuantLinear, QuantMethod, masters, quant_layers
from wrinklefree.runs.setup import Run
from wrinklefree.runs.stage import prepare_student
from wrinklefree.tracking.terminal import spoken_time

log = logging.getLogger("wrinklefree")

# Damages are measured on so many rows of the training text, each of so many tokens. Held-out text is for comparing.
ROWS, LENGTH = 4, 128
SECONDS = 1200.0  # with fewer rows if it would take longer
BUCKETS = 4096
HEADER = 160  # bytes at most that a tensor takes in the header of a file: name, dtype, shape, place


@dataclass(frozen=True)
class Cost:
    """What a layer costs with one value of the ladder."""

    bytes: int
    damage: float  # nats per token


Costs = dict[str, dict[int, Cost]]  # by layer, or by the names of several with spaces between, then by value


@dataclass(frozen=True)
class Budget:
    """The bytes that the quantized layers may take."""

    bytes: int
    words: str  # the option that says so
    label: str  # the same in the names of runs


def ladder(method: QuantMethod, name: str) -> tuple[str, tuple[int, ...]]:
    """The setting that gives a method its bits, and its values. Raises UserError if it has no such setting."""
    if method.ladder is None:
        raise UserError(f"--methods {name}: {method.name} has no setting for more or fewer bits to mix")
    return method.ladder


def measured(run: Run, file: Path) -> Costs:
    """Measure every group of layers with every value of the ladder, or take what `file` has of the same settings.

    The file is written after each value, so an interrupted measurement goes on.
    """
    key, values = ladder(run.config.method, run.config.method.name)
    made_by = _made_by(run.config, run.model)
    kept = read_json(file) if file.is_file() else {}
    if kept.get("made_by") != made_by:
        kept = {"made_by": made_by, "setting": key, "tables": {}}
    tables = kept["tables"]
    for value in values:
        if str(value) not in tables:
            log.info("mixed precision: each layer with %s=%d", key, value)
            method = dataclasses.replace(run.config.method, **{key: value}, per_layer=[])
            tables[str(value)] = _table(run, method, kept, len(values))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, kept)
    layers = next(iter(tables.values()))
    return {layer: {value: Cost(*tables[str(value)][layer]) for value in values} for layer in layers}


def _made_by(config: Config, model: PreTrainedModel) -> str:
    weights = dict(model.named_parameters())
    data = dataclasses.asdict(config.data)
    return fingerprint([model_fingerprint(weights), dataclasses.asdict(config.method), data, config.seed])


@torch.no_grad()
def _table(run: Run, method: QuantMethod, kept: dict[str, Any], values: int) -> dict[str, tuple[int, float]]:
    """(bytes, damage) of each group of layers with the settings `method`.

    The first time it chooses how much text is affordable, and puts the number of batches into `kept`.
    """
    config = dataclasses.replace(run.config, method=method)
    config.training = dataclasses.replace(config.training, start="plain")  # so that scales are fitted here
    config.training.blockwise = dataclasses.replace(config.training.blockwise, enabled=False)
    student = prepare_student(config, run.model)
    layers, batches = quant_layers(student), first_rows(run, ROWS, LENGTH)
    with masters(layers.values()):
        groups = _groups(run, student, layers, batches[0])
        if "batches" not in kept:
            began = run.clock()
            _Distance(run, batches[:1]).of(student)
            seconds = (run.clock() - began) / 2 * len(groups) * values
            kept["batches"] = max(1, min(len(batches), int(SECONDS / max(seconds, 1e-9))))
            spoken = spoken_time(seconds * kept["batches"])
            log.info("mixed precision: %d groups of layers, about %s in all", len(groups), spoken)
        distance = _Distance(run, batches[: kept["batches"]])
        return {" ".join(group): _cost(student, [layers[fqn] for fqn in group], distance) for group in groups}


def _cost(student: PreTrainedModel, group: Sequence[QuantLinear], distance: "_Distance") -> tuple[int, float]:
    """The bytes of a group of layers, and the damage if these alone are quantized."""
    before = [layer.effective for layer in group]
    for layer in group:
        layer.effective = EffectiveWeight()
    damage = max(0.0, distance.of(student))
    for layer, effective in zip(group, before, strict=True):
        layer.effective = effective
    return sum(-(-layer.encode().num_bits() // 8) for layer in group), damage


def _groups(
    run: Run, student: PreTrainedModel, layers: Mapping[str, QuantLinear], batch: Mapping[str, Tensor]
) -> list[list[str]]:
    """The layers that read the same input, such as q, k and v: engines multiply with them at once if they are alike."""
    seen, kept = defaultdict[int, list[str]](list), list[Tensor]()

    def see(fqn: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])  # so that no other tensor gets its id
        seen[id(inputs[0])].append(fqn)

    handles = [layer.register_forward_pre_hook(partial(see, fqn)) for fqn, layer in layers.items()]
    _logits(run, student, batch)
    for handle in handles:
        handle.remove()
    found = [group for group in seen.values() if len(group) == len(set(group))]
    used = {fqn for group in found for fqn in group}
    return [*found, *([fqn] for fqn in layers if fqn not in used)]


class _Distance:
    """The KL from the original on some text, whose predictions are kept."""

    def __init__(self, run: Run, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self.run, self.batches = run, batches
        self.original = [_logits(run, run.model, batch) for batch in batches]

    def of(self, model: PreTrainedModel) -> float:
        """The mean KL(original || model), nats per token."""
        total, tokens = 0.0, 0
        for batch, original in zip(self.batches, self.original, strict=True):
            total += float((original.exp() * (original - _logits(self.run, model, batch))).sum())
            tokens += len(original)
        return total / tokens


@torch.no_grad()
def _logits(run: Run, model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """The log-probabilities that a model gives, fp32 [tokens, words]."""
    inputs = {name: tensor.to(model.device) for name, tensor in model_inputs(batch).items()}
    with run.plan.autocast(model.device):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().flatten(0, 1).log_softmax(-1)


def budget_of(run: Run, costs: Costs, fit_bytes: int | None, bits: float | None) -> Budget:
    """The bytes that the quantized layers may take.

    `fit_bytes` is for the whole file: embedding and head, norms, and the header are taken off. `bits` are per quantized
    weight, scales included. Raises UserError if no choice fits.
    """
    layers = {fqn: run.model.get_submodule(fqn) for group in costs for fqn in group.split()}
    weights = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    least = sum(min(cost.bytes for cost in row.values()) for row in costs.values())
    if bits is not None:
        budget, words, label, outside = int(bits * weights / 8), f"--bits {bits:g}", f"{bits:g}bit", 0
    else:
        assert fit_bytes is not None
        tensors = sum(1 for _ in run.model.parameters()) + 4 * len(layers)
        outside = references.file_bytes(run.model, layers, 0.0, run.config.export.head_bits or 16) + HEADER * tensors
        budget, words, label = fit_bytes - outside, f"--fit-bytes {fit_bytes}", f"{fit_bytes / 1e6:g}MB"
    if budget < least:
        need = f"{8 * least / weights:.2f}" if bits is not None else f"{least + outside:,}"
        raise UserError(f"{words}: too little: with the fewest bits everywhere it takes {need}")
    return Budget(budget, words, label)


def best(costs: Costs, budget: int) -> dict[str, int]:
    """The value for each layer with the least sum of damages, within `budget` bytes; the fewest bits if none fits."""
    unit = max(1, budget // BUCKETS)
    room = budget // unit
    least: NDArray[numpy.float64] = numpy.zeros(room + 1)  # the least damage with so many units, of the layers so far
    choices: list[NDArray[numpy.int64]] = []
    for row in costs.values():
        options = []
        for cost in row.values():
            units = -(-cost.bytes // unit)
            moved = numpy.full(room + 1, numpy.inf)
            if units <= room:
                moved[units:] = least[: room + 1 - units] + cost.damage
            options.append(moved)
        stacked = numpy.stack(options)
        choices.append(stacked.argmin(0))
        least = stacked.min(0)
    if not numpy.isfinite(least[room]):
        return {fqn: min(row, key=lambda value: row[value].bytes) for fqn, row in costs.items()}
    found, left = dict[str, int](), room
    for (fqn, row), choice in zip(reversed(costs.items()), reversed(choices), strict=True):
        value, cost = list(row.items())[choice[left]]
        found[fqn], left = value, left - -(-cost.bytes // unit)
    return {fqn: found[fqn] for fqn in costs}


def even(costs: Costs, budget: int) -> dict[str, int]:
    """The value for each layer without a look at the damages: two neighbouring values, evenly spread, that fill it."""
    values = list(next(iter(costs.values())))
    totals = [sum(row[value].bytes for row in costs.values()) for value in values]
    low = max((i for i, total in enumerate(totals) if total <= budget), default=0)
    if low + 1 == len(values):
        return dict.fromkeys(costs, values[low])
    share = (budget - totals[low]) / (totals[low + 1] - totals[low])
    found, spent, owed = dict[str, int](), totals[low], 0.0
    for fqn, row in costs.items():
        owed += share
        more = row[values[low + 1]].bytes - row[values[low]].bytes
        higher = owed >= 0.5 and spent + more <= budget
        found[fqn], owed, spent = values[low + higher], owed - higher, spent + more * higher
    return found


def spent(costs: Costs, chosen: Mapping[str, int]) -> int:
    """The bytes of a choice."""
    return sum(costs[fqn][value].bytes for fqn, value in chosen.items())


def per_layer(key: str, chosen: Mapping[str, int]) -> list[str]:
    """A choice as `method.per_layer`."""
    groups: dict[int, list[str]] = defaultdict(list)
    for fqn, value in chosen.items():
        groups[value].append(fqn)
    return [f"{key}={value} {' '.join(layers)}" for value, layers in sorted(groups.items())]


def described(key: str, costs: Costs, chosen: Mapping[str, int]) -> str:
    """How many layers have which value, and what damage is to be expected."""
    counts: dict[int, int] = defaultdict(int)
    for group, value in chosen.items():
        counts[value] += len(group.split())
    parts = ", ".join(f"{count} layers with {key}={value}" for value, count in sorted(counts.items()))
    damage = sum(costs[fqn][value].damage for fqn, value in chosen.items())
    return f"{parts}; sum of damages {damage:.3f} nats"
