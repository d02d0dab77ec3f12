"""Training the network: each thought from the true ones before it, or from its own, and figures that know the truth."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from wrinklefree.config.thinking import NetworkConfig
from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.network import LatentThinker, ThinkerConfig
from wrinklefree.thinking.recursion import Recursion, prompt_of, read, read_out
from wrinklefree.thinking.speech import Speaker

pytestmark = pytest.mark.numeric


def test_teacher_forcing_is_one_step_at_a_time(
    toy: Path, thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    """All thoughts at once have the loss of each by itself, after the true one before it."""
    objective = Recursion(thinker, speaker.decoder, NetworkConfig(noise=0.0, mse_weight=1.0, halt_weight=0.0))
    batch = train.batch(range(5))
    loss, metrics = next(objective(batch))
    targets, net = thinker.whiten(batch["thoughts"]), thinker.network
    errors, kls = [], []
    for i, n in enumerate(batch["num_thoughts"].tolist()):
        states, mask = prompt_of(thinker, {name: t[i : i + 1] for name, t in batch.items()})
        context = net.context(states, mask)
        before = torch.zeros(1, 32)
        for j in range(n):
            thought, _ = net.step(context, before, torch.tensor([j]))
            before = targets[i, j : j + 1]
            errors.append((thought - before).square().mean())
            said, meant = (read(speaker.decoder, thinker, x).log_softmax(-1) for x in (thought, before))
            kls.append((meant.exp() * (meant - said)).sum())
    torch.testing.assert_close(metrics["mse"], torch.stack(errors).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["kl"], torch.stack(kls).mean(), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(loss, metrics["kl"] + metrics["mse"], atol=1e-4, rtol=1e-4)


def test_sampled_thoughts_are_those_of_thinking_freely(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs
) -> None:
    objective = Recursion(thinker, speaker.decoder, NetworkConfig(sampled_from=0.5))
    objective.on_step(4, 10)
    assert not objective.sampling
    objective.on_step(5, 10)
    assert objective.sampling
    thinker.keep_average()  # one network for both
    thinker.config.max_thoughts = 6
    batch = train.batch(range(4))
    with torch.no_grad():
        thinker.network.halt.bias.fill_(-9.0)
        free, _ = thinker.think(*prompt_of(thinker, batch))
    own = objective._own(batch, batch["thoughts"].shape[1])
    torch.testing.assert_close(own, free[:, : own.shape[1]], atol=1e-5, rtol=1e-5)


def test_deep_supervision_is_a_step_a_round(speaker: Speaker, train: HiddenPairs, toy: Path) -> None:
    """Mode final yields a loss for every round, each from where the last one ended, without a gradient into it."""
    torch.manual_seed(0)
    shape = {"width": 64, "d_compressed": 32, "hidden_size": 32, "num_heads": 2, "mode": "final", "max_thoughts": 3}
    model = LatentThinker(ThinkerConfig(**shape))
    objective = Recursion(model, speaker.decoder, NetworkConfig(mode="final", max_thoughts=3))
    values = []
    for loss, _ in objective(train.batch(range(4))):
        loss.backward()  # would fail where it reached into the round before
        values.append(loss.item())
    assert len(values) == 3
    assert len(set(values)) == 3


def test_read_out_of_true_thoughts_is_the_model_itself(
    thinker: LatentThinker, speaker: Speaker, train: HiddenPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thinker that thinks what the model thought has no error, halts right, and its mean does not."""
    batches = iter(list(train.batches(8, 16)))

    def perfect(states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        batch = next(batches)
        return thinker.whiten(batch["thoughts"]), torch.arange(batch["thoughts"].shape[1]) < batch["num_thoughts"][
            :, None
        ]

    monkeypatch.setattr(thinker, "think", perfect)
    figures = read_out(thinker, speaker.decoder, train, 16, batch_size=8)
    assert (figures.halted, round(figures.cosine, 5), round(figures.r2, 5)) == (1.0, 1.0, 1.0)
    assert figures.kl < 1e-6
    assert figures.mean_cosine < 0.999
