"""Reconstruction counts no padding and sums exactly, and PCA and Fisher codes are the optima of what they minimize."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCAB, ids, llama
from torch import Tensor

from wrinklefree.core.batch import IGNORE, Batch
from wrinklefree.data.packing import make_batch, pack, padding
from wrinklefree.distributed.world import ALONE
from wrinklefree.objectives.language_model import BodyAndHead
from wrinklefree.thinking import gathering
from wrinklefree.thinking.gathering import Gathered
from wrinklefree.thinking.moments import Moments, principal_axes, weighted_code
from wrinklefree.thinking.network import DimensionCompressor
from wrinklefree.thinking.reading import compare_readings
from wrinklefree.thinking.reconstruction import (
    TRAINED_METRICS,
    MarkedStream,
    Reconstruction,
    added,
    mark,
    metrics,
    real_states,
    sums_of,
)

pytestmark = pytest.mark.numeric
PAD = VOCAB - 1
WIDTH, SIZE = 64, 8


@pytest.fixture(scope="module")
def decoder() -> BodyAndHead:
    return BodyAndHead(llama().requires_grad_(False))


@pytest.fixture(scope="module")
def states(decoder: BodyAndHead) -> Tensor:
    """Some 1,500 states [N, D] of the toy model."""
    return real_states(decoder, mark(rows(64), PAD))


def rows(count: int, length: int = 24) -> Batch:
    """Rows of random words, each one document."""
    generator = torch.Generator().manual_seed(count)
    blocks = torch.zeros(count, 3, length, dtype=torch.int64)
    blocks[:, 0] = torch.randint(0, VOCAB - 1, (count, length), generator=generator)
    blocks[:, 1, 0] = 1
    blocks[:, 2, 1:] = 1
    return make_batch(blocks)


def gathered(states: Tensor) -> Gathered:
    moments = Moments.zeros(states.shape[1])
    moments.add(states)
    return Gathered(moments)


def test_the_head_reads_the_logits_in_the_states() -> None:
    model = llama()
    decoder = BodyAndHead(model)
    batch = {"input_ids": ids()}
    states, head = decoder.project(decoder.states(batch))
    torch.testing.assert_close(F.linear(states, head), model(**batch).logits)


def test_padding_does_not_count(decoder: BodyAndHead) -> None:
    """The same documents alone, and with padding behind them: loss, metrics and moments are the same."""
    documents = [torch.tensor([[3, 4, 5, PAD], [1, 0, 0, 0], [0, 1, 1, 1]]), torch.tensor([[9, PAD], [1, 0], [0, 1]])]
    bare = mark(make_batch(torch.cat(documents, dim=1)[None]), PAD)
    padded = mark(make_batch(pack(documents, 16, PAD)), PAD)
    found = []
    for batch in (bare, padded):
        assert int((batch["labels"][:, 1:] != IGNORE).sum()) == 6  # as the trainer counts them
        torch.manual_seed(0)
        objective = Reconstruction(DimensionCompressor(WIDTH, SIZE), decoder, "mse")
        ((loss, values),) = objective(batch)
        assert set(values) == set(TRAINED_METRICS)
        figures = objective.measure([batch], {"": objective.compressor})[0][""]
        found.append({"train": loss.item(), **{name: float(value) for name, value in values.items()}, **figures})
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["train"] == pytest.approx(found[0]["mse"], rel=1e-5)


def test_what_looks_like_padding_inside_a_block_counts() -> None:
    """End-of-sequence tokens that are text, and a document's first token at the end of a block."""
    block = torch.cat([padding(2, PAD), torch.tensor([[5, PAD, 7], [1, 0, 1], [0, 1, 0]])], dim=1)
    assert (mark(make_batch(block[None]), PAD)["labels"][0, 1:] != IGNORE).all()


def test_metrics_are_what_they_are_called_and_exact_over_batches(states: Tensor) -> None:
    torch.manual_seed(1)
    rebuilt = DimensionCompressor(WIDTH, SIZE)(states).detach()
    parts = [sums_of(x, y) for x, y in zip(states.split(77), rebuilt.split(77), strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = added(total, part)
    x, y, mean = states.double(), rebuilt.double(), states.double().mean(0)
    expected = {
        "mse": F.mse_loss(y, x),
        "cosine_similarity": F.cosine_similarity(x, y).mean(),
        "relative_error": (y - x).norm() / x.norm(),
        "variance_ratio": (y.var(0) / x.var(0)).mean(),
        "mean_only_cosine": F.cosine_similarity(x, mean.expand_as(x)).mean(),
        "r2": 1 - (y - x).square().sum() / (x - mean).square().sum(),
    }
    assert {k: float(v) for k, v in metrics(total).items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-6
    )


def test_the_floor_of_pca_is_the_measured_error(decoder: BodyAndHead, states: Tensor) -> None:
    found = gathered(states)
    for size in (1, SIZE, WIDTH):
        made = found.pca.put(DimensionCompressor(WIDTH, size))
        measured = F.mse_loss(made(states), states).item()
        assert found.pca.mse(found.moments, size) == pytest.approx(measured, rel=1e-4, abs=1e-6)
        left_out = principal_axes(found.moments.second)[0][size:].sum().item() / WIDTH  # eigenvalues
        assert left_out == pytest.approx(measured, rel=1e-4, abs=1e-6)
    figures, count = Reconstruction(made, decoder, "mse").measure([mark(rows(64), PAD)], {"all": made})
    assert count == len(states)
    assert figures["all"]["r2"] == pytest.approx(1, abs=1e-5)
    assert figures["all"]["top1_agreement"] > 0.99


def test_training_comes_near_pca_and_not_below(states: Tensor) -> None:
    torch.manual_seed(0)
    trained = DimensionCompressor(WIDTH, SIZE)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.01)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 300)
        F.mse_loss(trained(states), states).backward()
        optimizer.step()
        optimizer.zero_grad()
    floor = gathered(states).pca.mse(gathered(states).moments, SIZE)
    assert floor <= F.mse_loss(trained(states), states).item() < 1.02 * floor


def passed_over(decoder: BodyAndHead, stream: MarkedStream, kept: Path) -> gathering.Gathered:
    return gathering.gather_moments(
        decoder, stream, ALONE, blocks=64, batch_size=64, width=WIDTH, weighted=True, kept=kept, identity="one"
    )


def test_fisher_has_the_least_error_in_its_metric_and_less_kl(
    decoder: BodyAndHead, states: Tensor, tmp_path: Path
) -> None:
    """Less than PCA and a random metric in its objective; and in the KL itself, which that stands for."""
    stream = MarkedStream(Repeated(rows(64)), PAD)
    found = passed_over(decoder, stream, tmp_path)
    assert found.mean_metric is not None
    noise = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    codes = {
        "fisher": found.fisher,
        "pca": found.pca,
        "random": gathering.Code(*weighted_code(found.moments, noise @ noise.T, WIDTH)),
    }
    compressors = {name: code.put(DimensionCompressor(WIDTH, SIZE, tied=False)) for name, code in codes.items()}
    objective = Reconstruction(compressors["fisher"], decoder, "fisher", found.mean_metric)
    figures, _ = objective.measure([mark(rows(64), PAD)], compressors)
    assert figures["fisher"]["loss"] < min(figures["pca"]["loss"], figures["random"]["loss"])
    assert figures["fisher"]["kl"] < min(figures["pca"]["kl"], figures["random"]["kl"])
    weight = compressors["fisher"].weight
    loss = objective.loss(states, compressors["fisher"](states))
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.norm() < 1e-3 * loss / weight.detach().norm()  # nothing to gain in any direction


def test_the_fisher_metric_is_the_kl_to_second_order(decoder: BodyAndHead, states: Tensor, tmp_path: Path) -> None:
    """Of small errors that know nothing of the state."""
    stream = MarkedStream(Repeated(rows(64)), PAD)
    found = passed_over(decoder, stream, tmp_path)
    objective = Reconstruction(DimensionCompressor(WIDTH, SIZE), decoder, "fisher", found.mean_metric)
    rebuilt = states + 0.1 * torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    assert objective.loss(states, rebuilt).item() == pytest.approx(
        compare_readings(decoder, states, rebuilt).kl.item(), rel=0.02
    )


class Repeated:
    """A stream of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __next__(self) -> Batch:
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": 0}
