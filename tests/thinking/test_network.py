"""The recursive network reads prompts in order and without padding, recurs as its settings say, and halts alone."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wrinklefree.thinking.network import LatentThinker, RecursiveNetwork, ThinkerConfig

pytestmark = pytest.mark.numeric


def network(**values: Any) -> RecursiveNetwork:
    torch.manual_seed(0)
    return RecursiveNetwork(ThinkerConfig(**({"d_compressed": 8, "hidden_size": 32, "num_heads": 2} | values)))


def context_of(net: RecursiveNetwork, lengths: Sequence[int] = (5, 3)) -> Any:
    torch.manual_seed(1)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return net.context(torch.randn(len(lengths), max(lengths), 8) * mask[..., None], mask)


def test_the_order_of_the_prompt_matters() -> None:
    net = network()
    states, mask = torch.randn(1, 5, 8), torch.ones(1, 5, dtype=torch.bool)
    zero = torch.zeros(1, 8), torch.zeros(1, dtype=torch.long)
    thought, _ = net.step(net.context(states, mask), *zero)
    other, _ = net.step(net.context(states[:, [1, 0, 2, 3, 4]], mask), *zero)
    assert (thought - other).abs().max() > 1e-3


def test_padding_on_either_side_changes_nothing() -> None:
    net = network()
    states, zero = torch.randn(1, 4, 8), (torch.zeros(1, 8), torch.zeros(1, dtype=torch.long))
    plain, _ = net.step(net.context(states, torch.ones(1, 4, dtype=torch.bool)), *zero)
    for pad in ((0, 0, 0, 3), (0, 0, 3, 0)):
        mask = F.pad(torch.ones(1, 4, dtype=torch.bool), pad[2:])
        padded, _ = net.step(net.context(F.pad(states, pad, value=7.0), mask), *zero)
        torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-5)


def test_rotary_angles_turn_by_the_distance() -> None:
    from wrinklefree.thinking.network import rotate

    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8)
    speeds = torch.tensor([1.0, 0.5, 0.25, 0.1]).repeat(2)
    signs = torch.tensor([-1.0, 1.0]).repeat_interleave(4)

    def product(first: int, second: int) -> Tensor:
        at = [torch.full((1, 1, 1), float(place)) * speeds for place in (first, second)]
        return (rotate(q, at[0].cos(), signs * at[0].sin()) * rotate(k, at[1].cos(), signs * at[1].sin())).sum()

    torch.testing.assert_close(product(3, 1), product(12, 10))
    assert abs(product(3, 1) - product(3, 2)) > 1e-4


def test_only_the_last_deep_recursion_has_a_gradient() -> None:
    """T = 2 has the gradient of one recursion that begins where the first has ended."""
    two, one = network(n_deep_recursions=2, n_latent_steps=2), network(n_deep_recursions=1, n_latent_steps=2)
    context = context_of(two)
    y, _ = two.recurse(context, *two.begin(context))
    y.sum().backward()
    context = context_of(one)
    with torch.no_grad():
        begun = one.recurse(context, *one.begin(context))
    expected, _ = one.recurse(context, *begun)
    expected.sum().backward()
    torch.testing.assert_close(y, expected)
    mine, other = (dict(net.named_parameters()) for net in (two, one))
    for name in ("blocks.0.qkv.weight", "blocks.1.down.weight", "embed.weight"):
        torch.testing.assert_close(mine[name].grad, other[name].grad)


def test_the_slot_alone_is_the_slot_among_all_places() -> None:
    net = network(n_deep_recursions=2)
    context = context_of(net)
    whole, z = net.recurse(context, *net.begin(context))
    alone, other = net.recurse(context, *net.begin(context), slot_only=True)
    assert alone.shape[1] == 1
    torch.testing.assert_close(alone[:, 0], whole[:, -1])
    assert torch.equal(z, other)


def test_n_latent_steps_are_taken() -> None:
    net = network(n_latent_steps=2)
    context = context_of(net)
    y, z = net.begin(context)
    first = net.f(context.x + y + z, context)
    second = net.f(context.x + y + first, context)
    torch.testing.assert_close(net.recurse(context, y, z)[0], net.f(y + second, context))


@pytest.mark.parametrize("mode", ["trajectory", "final"])
def test_each_sample_halts_by_itself(mode: str) -> None:
    """Thinking in a batch and alone gives the same thoughts, and as many."""
    torch.manual_seed(0)
    shape = {"width": 12, "d_compressed": 8, "hidden_size": 32, "num_heads": 2, "max_thoughts": 5, "mode": mode}
    model = LatentThinker(ThinkerConfig(**shape)).eval()
    with torch.no_grad():
        model.average.halt.weight.copy_(torch.randn(1, 32))
    lengths = torch.tensor([4, 2, 3, 4, 3, 2, 4, 3])
    mask = torch.arange(4) < lengths[:, None]
    states = torch.randn(8, 4, 8)
    context = model.average.context(states, mask)
    begun = [model.average.step(context, torch.zeros(8, 8), torch.zeros(8, dtype=torch.long))[1]]
    begun += [model.average.read(model.average.recurse(context, *model.average.begin(context))[0])[1]]
    with torch.no_grad():  # some halt at once, the others later or never
        model.average.halt.bias.copy_(-begun[mode == "final"].sort().values[3:5].mean())
    thoughts, soft_mask = model.think(states, mask)
    counts = soft_mask.sum(1)
    assert len(set(counts.tolist())) > 1
    for i in range(8):
        alone, mask_alone = model.think(states[i : i + 1, : lengths[i]], mask[i : i + 1, : lengths[i]])
        assert mask_alone.sum() == counts[i]
        torch.testing.assert_close(alone[0, : counts[i]], thoughts[i, : counts[i]], atol=1e-5, rtol=1e-5)


def test_the_mean_of_the_weights_is_what_thinks(thinker: LatentThinker) -> None:
    before = copy.deepcopy(thinker.average.state_dict())
    with torch.no_grad():
        for parameter in thinker.network.parameters():
            parameter.add_(torch.randn_like(parameter))
    states, mask = torch.randn(2, 4, 32), torch.ones(2, 4, dtype=torch.bool)
    unmoved = thinker.think(states, mask)[0]
    thinker.update_average(0.75)
    for name, parameter in thinker.average.named_parameters():
        expected = 0.75 * before[name] + 0.25 * thinker.network.state_dict()[name]
        torch.testing.assert_close(parameter, expected)
    assert not torch.equal(thinker.think(states, mask)[0], unmoved)
    thinker.keep_average()
    torch.testing.assert_close(thinker.network.state_dict()["head.weight"], parameter_of(thinker, before))
    assert thinker.average is None


def parameter_of(thinker: LatentThinker, before: dict[str, Tensor]) -> Tensor:
    """What `head.weight` is once the mean is kept."""
    return thinker.network.head.weight.detach().clone()
