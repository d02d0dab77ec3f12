"""What every quantization method promises: the suite runs over each file of `methods/` and its settings.

A method's settings are its defaults and, one at a time, every other value of its fields with a list of choices.
"""

import copy
import dataclasses
import importlib
import logging
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from tiny import ids, llama, with_toy_method
from torch import Tensor, nn

from wrinklefree import methods
from wrinklefree.core.codes import Codes, pack, unpack
from wrinklefree.core.effective import EffectiveWeight
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantLinear, QuantMethod, available, find, quant_layers
from wrinklefree.export.bundle import part_of

pytestmark = pytest.mark.numeric

WIDTH = 128


def choices(cls: type) -> Iterator[tuple[str, object]]:
    """(field, value) for every `Literal` value of a config's fields."""
    for name, hint in get_type_hints(cls).items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Literal:
                yield from ((name, value) for value in get_args(part))


def settings() -> dict[str, QuantMethod]:
    """Every method with its defaults, then with one choice changed; combinations that it refuses are left out."""
    found: dict[str, QuantMethod] = {}
    with with_toy_method():
        for name in available():
            default = find(name)(name=name)
            found[name] = default
            for key, value in choices(type(default)):
                if value != getattr(default, key):
                    try:
                        found[f"{name}-{key}-{value}"] = dataclasses.replace(default, **{key: value})
                    except ValueError:
                        continue
    return found


SETTINGS = settings()
DEFAULTS = {name: method for name, method in SETTINGS.items() if "-" not in name}


class Net(nn.Module):
    """Embedding, two linear layers (one with bias), a norm and a head."""

    def __init__(self, width: int = WIDTH, inner: int = 2 * WIDTH) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(16, width)
        self.up = nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.lm_head = nn.Linear(width, 16, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        x = x + self.down_proj(self.norm(self.up(x)))
        logits: Tensor = self.lm_head(x)
        return logits


def net(seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


TOKENS = torch.arange(12).reshape(3, 4)


@pytest.fixture(scope="module", autouse=True)
def _toy() -> Iterator[None]:
    with with_toy_method():
        yield


@pytest.fixture(params=SETTINGS)
def method(request: pytest.FixtureRequest) -> QuantMethod:
    return SETTINGS[request.param]


@pytest.fixture(params=DEFAULTS)
def default(request: pytest.FixtureRequest) -> QuantMethod:
    return DEFAULTS[request.param]


@pytest.fixture
def model(method: QuantMethod) -> Net:
    prepared = method.prepare(net())
    assert isinstance(prepared, Net)
    return prepared


def assert_same_codes(a: Codes, b: Codes) -> None:
    assert (a.bits, a.shape, a.tensors.keys()) == (b.bits, b.shape, b.tensors.keys())
    assert torch.equal(a.index, b.index)
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def encodes(monkeypatch: pytest.MonkeyPatch, default: QuantMethod) -> list[QuantLinear]:
    """The layers that were encoded, in order."""
    calls: list[QuantLinear] = []
    encode = default.layer.encode

    def counting(self: QuantLinear) -> Codes:
        calls.append(self)
        return encode(self)

    monkeypatch.setattr(default.layer, "encode", counting)
    return calls


def test_the_suite_covers_every_method_in_the_package() -> None:
    files = {module.name for module in pkgutil.iter_modules(methods.__path__)}
    assert files
    assert set(DEFAULTS) == {*files, "toy"}


def test_only_linear_layers_that_are_not_excluded_change(model: Net) -> None:
    assert quant_layers(model).keys() == {"up", "down_proj"}
    assert type(model.lm_head) is nn.Linear
    assert type(model.embed_tokens) is nn.Embedding
    assert type(model.norm) is nn.LayerNorm


def test_exclude_names_is_obeyed(default: QuantMethod) -> None:
    prepared = dataclasses.replace(default, exclude_names=["up"]).prepare(net())
    assert quant_layers(prepared).keys() == {"down_proj", "lm_head"}


def test_masters_keep_names_shapes_and_values_in_fp32(method: QuantMethod) -> None:
    before = net().bfloat16().state_dict()
    prepared = dataclasses.replace(method, rotate_inputs=False).prepare(net().bfloat16())
    after = prepared.state_dict()
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)
    assert {after["up.weight"].dtype, after["down_proj.weight"].dtype} == {torch.float32}
    added = {name.rpartition(".")[0].removesuffix(".rms_norm") for name in after.keys() - before.keys()}
    assert added <= quant_layers(prepared).keys()
    assert prepared(TOKENS).dtype == torch.bfloat16


def test_a_cast_to_fewer_bits_leaves_masters_and_scales_as_they_are(model: Net) -> None:
    layer = model.up
    own = {name: tensor.clone() for name, tensor in layer.named_parameters(recurse=False) if name != "bias"}
    weight = layer.effective_weight(torch.float32).clone()
    model.bfloat16()
    assert all(torch.equal(tensor, layer.get_parameter(name)) for name, tensor in own.items())
    assert torch.equal(weight, layer.effective_weight(torch.float32))
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model(TOKENS).dtype == torch.bfloat16
    assert model.float().up.weight.dtype == torch.float32


def test_converting_again_changes_nothing(method: QuantMethod, model: Net) -> None:
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    again = method.prepare(model)
    assert all(a is b for a, b in zip(modules, again.modules(), strict=True))
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())


def test_nothing_to_quantize_is_an_error(default: QuantMethod) -> None:
    with pytest.raises(UserError, match="no linear layer"):
        dataclasses.replace(default, exclude_names=["*"]).prepare(net())


def test_what_cannot_be_converted_is_named(default: QuantMethod, caplog: pytest.LogCaptureFixture) -> None:
    holder = nn.Module()
    holder.experts = nn.Module()
    holder.experts.gate_up_proj = nn.Parameter(torch.randn(4, 8, 8))
    holder.down_proj = nn.Linear(16, 16)
    with caplog.at_level(logging.WARNING, "wrinklefree"):
        default.prepare(holder)
    assert "experts.gate_up_proj" in caplog.text


def test_codes_fit_their_bits_and_survive_packing(model: Net) -> None:
    for layer in quant_layers(model).values():
        codes = layer.encode()
        assert codes.index.dtype == torch.uint8
        assert int(codes.index.max()) < 2**codes.bits
        packed = pack(codes.index, codes.bits)
        assert packed.numel() * 8 <= codes.num_bits()
        assert torch.equal(unpack(packed, codes.bits, codes.index.shape[-1]), codes.index)


def test_codes_are_what_is_stored_in_fp16(model: Net) -> None:
    """Scales and tables survive half precision, so decoding a file gives the bits that training saw."""
    for layer in quant_layers(model).values():
        codes = layer.encode()
        halved = {name: tensor.detach().half() for name, tensor in codes.tensors.items()}
        stored = Codes(codes.index, codes.bits, halved, codes.shape)
        assert torch.equal(layer.decode(stored), layer.decode(codes))


def test_decode_of_encode_is_the_effective_weight(model: Net) -> None:
    for layer in quant_layers(model).values():
        decoded = layer.decode(layer.encode())
        assert tuple(decoded.shape) == layer.encode().shape == (layer.out_features, layer.in_features)
        assert decoded.dtype == torch.float32
        assert torch.equal(layer.effective_weight(torch.float32), decoded)
        assert not torch.equal(decoded, layer.weight)


def test_the_part_that_packed_folders_carry_answers_as_the_method(method: QuantMethod, model: Net) -> None:
    """If the method has such a part: `decode.py` in its folder."""
    name = part_of(type(method).__module__)
    if not name.endswith(".decode"):
        return
    part = importlib.import_module(name)
    assert part.int8_inputs(dataclasses.asdict(method)) == method.int8_inputs
    for layer in quant_layers(model).values():
        assert torch.equal(part.decode(layer.encode()), layer.decode(layer.encode()))


def test_forward_is_a_linear_with_the_effective_weight(model: Net) -> None:
    for layer in quant_layers(model).values():
        x = torch.randn(5, layer.in_features)
        expected = F.linear(layer.inputs(x), layer.decode(layer.encode()), layer.bias)
        assert torch.equal(layer(x), expected)


def test_gradients_are_those_of_plain_autograd(model: Net) -> None:
    for layer in quant_layers(model).values():
        x = torch.randn(5, layer.in_features)
        target = torch.randn(5, layer.out_features)
        (layer(x) * target).sum().backward()
        ours = grads(layer)
        layer.zero_grad()
        plain = F.linear(layer.inputs(x), layer.quantized_weight(), layer.bias)
        (plain * target).sum().backward()
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert ours.keys() == grads(layer).keys() == trained
        assert all(torch.allclose(ours[name], g, rtol=1e-5, atol=1e-6) for name, g in grads(layer).items())
        assert all(g.abs().sum() > 0 for g in ours.values())


def test_the_master_gets_the_gradient_of_the_effective_weight(model: Net) -> None:
    """Straight through: nothing but the method's own scales stands between.

    A method with an estimator of its own may leave weights out, but only those at the ends of its codes: a step further
    out changes nothing of what they stand for.
    """
    for layer in quant_layers(model).values():
        if not layer.weight.requires_grad:
            continue
        x = torch.randn(5, layer.in_features)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        expected = layer.inputs(x).sum(0).expand_as(layer.weight)
        left_out = layer.weight.grad == 0
        if type(layer).quantized_weight is QuantLinear.quantized_weight:
            assert not left_out.any()
        assert left_out.float().mean() < 0.3
        assert torch.allclose(layer.weight.grad, expected * ~left_out, rtol=1e-5, atol=1e-5)
        before = layer.effective_weight(torch.float32)[left_out]
        with torch.no_grad():
            layer.weight[left_out] *= 2
        assert torch.equal(layer.effective_weight(torch.float32)[left_out], before)


@pytest.mark.parametrize("initialize", [True, False])
def test_state_dict_comes_back_strictly(method: QuantMethod, model: Net, initialize: bool) -> None:
    other = method.prepare(net(seed=1), initialize=initialize)
    other(TOKENS)
    other.load_state_dict(model.state_dict(), strict=True)
    for fqn, layer in quant_layers(model).items():
        assert_same_codes(layer.encode(), quant_layers(other)[fqn].encode())
    assert torch.equal(other(TOKENS), model(TOKENS))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_a_backward_work_and_are_independent(model: Net, duplicate) -> None:
    model(TOKENS).sum().backward()
    before = model(TOKENS).detach()
    other = duplicate(model)
    assert torch.equal(other(TOKENS), before)
    with torch.no_grad():
        for name, parameter in other.up.named_parameters():
            parameter.mul_(-2 if name == "weight" else 1.5)
    assert not torch.equal(other(TOKENS), before)
    assert torch.equal(model(TOKENS), before)
    other.zero_grad()
    other(TOKENS).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in other.up.parameters() if p.requires_grad)


def test_one_thread_gives_the_bits_of_two(method: QuantMethod) -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 512)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            linear = nn.Linear(512, 512, bias=False)
            linear.weight.data.copy_(weight)
            layer = method.layer(linear, method)
            (layer.effective_weight(torch.float32) * weight).sum().backward()
            results.append((layer.encode(), grads(layer)))
        finally:
            torch.set_num_threads(before)
    (codes, gradients), (codes2, gradients2) = results
    assert_same_codes(codes, codes2)
    assert all(torch.equal(gradients[name], gradients2[name]) for name in gradients)


def test_quantizer_arithmetic_is_fp32_under_autocast(model: Net) -> None:
    for layer in quant_layers(model).values():
        exact = layer.decode(layer.encode())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer.effective_weight(torch.bfloat16), exact.bfloat16())
            assert torch.equal(layer.effective_weight(torch.float32), exact)
            assert layer(torch.randn(2, layer.in_features)).dtype == torch.bfloat16


def test_autocast_is_off_while_effective_weights_are_computed() -> None:
    layer = nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = EffectiveWeight().get(layer, lambda: layer.weight @ layer.weight, torch.float32)
    assert torch.equal(found, layer.weight @ layer.weight)


def test_gradients_under_autocast_are_close_and_fp32(model: Net) -> None:
    model(TOKENS).square().mean().backward()
    exact = grads(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(TOKENS).square().mean()
    loss.backward()
    trained = [name for name in exact if name.startswith(("up.", "down_proj.")) and not name.endswith("bias")]
    assert trained
    for name in trained:
        gradient = grads(model)[name]
        assert gradient.dtype == torch.float32
        allowed = 0.05 if name.endswith("weight") else 0.2  # a scale's is a sum over many weights
        assert (gradient - exact[name]).norm() < allowed * exact[name].norm()


def test_a_step_encodes_every_layer_once(default: QuantMethod, encodes: list[QuantLinear]) -> None:
    """Micro-batches and the second forward of gradient checkpointing share the effective weight."""
    model = default.prepare(llama())
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    layers = len(quant_layers(model))
    for step in range(1, 4):
        for micro in range(3):
            tokens = ids().roll(micro)
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert len(encodes) == step * layers


def test_evaluation_and_generation_encode_every_layer_once(default: QuantMethod, encodes: list[QuantLinear]) -> None:
    model = default.prepare(llama()).train()
    model(ids()).logits.sum().backward()
    encodes.clear()
    model.eval()
    with torch.no_grad():
        model(ids())
        model(ids())
    model.generate(ids(1, 4), max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert len(encodes) == len(quant_layers(model))


@pytest.mark.parametrize("grad", [True, False])
def test_effective_weight_follows_every_write(default: QuantMethod, grad: bool) -> None:
    """After an optimizer step, after loading, after a write in place: never a stale weight."""
    model, other = default.prepare(net()), default.prepare(net(seed=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    writes = [optimizer.step, lambda: model.load_state_dict(other.state_dict()), lambda: model.up.weight.mul_(-1)]
    for write in writes:
        model(TOKENS).square().mean().backward()
        with torch.set_grad_enabled(grad):
            before = model.up.effective_weight(torch.float32).detach().clone()
        with torch.no_grad():
            write()
        with torch.set_grad_enabled(grad):
            after = model.up.effective_weight(torch.float32)
        assert not torch.equal(before, after)
        assert torch.equal(after, model.up.decode(model.up.encode()))


def test_two_micro_batches_give_the_gradients_of_one_double_batch(method: QuantMethod) -> None:
    accumulated, whole = method.prepare(net()), method.prepare(net())
    tokens = torch.arange(16).reshape(4, 4)
    for part in tokens.chunk(2):
        (accumulated(part).square().mean() / 2).backward()
    whole(tokens).square().mean().backward()
    expected, found = grads(whole), grads(accumulated)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_frozen_layer_gets_no_gradient_but_passes_one_on(default: QuantMethod) -> None:
    model = default.prepare(net())
    model.down_proj.requires_grad_(False)
    model(TOKENS).sum().backward()
    assert all(p.grad is None for p in model.down_proj.parameters())
    assert model.up.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("inputs", "outputs"), [(7, 6), (6, 7), (5, 3), (1, 1)])
def test_odd_widths(default: QuantMethod, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs)
    layer = default.layer(linear, default)
    x = torch.randn(4, inputs)
    weight = layer.decode(layer.encode())
    assert weight.shape == (outputs, inputs)
    assert (weight - layer.weight).norm() < 0.7 * layer.weight.norm()
    assert torch.equal(layer(x), F.linear(layer.inputs(x), weight, linear.bias))
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (outputs, inputs)
    assert layer.bias.grad.shape == (outputs,)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e4])
def test_extreme_weights_stay_finite(method: QuantMethod, value: float) -> None:
    linear = nn.Linear(WIDTH, WIDTH)
    nn.init.constant_(linear.weight, value)
    layer = method.layer(linear, method)
    layer(torch.ones(1, WIDTH)).sum().backward()
    assert layer.effective_weight(torch.float32).isfinite().all()
    assert all(g.isfinite().all() for g in grads(layer).values())


def test_an_unknown_setting_is_refused(default: QuantMethod) -> None:
    from wrinklefree.config.compose import load_config

    with pytest.raises(UserError, match=r"method\.num_stagez: unknown key"):
        load_config([f"method={default.name}", "method.num_stagez=3"])
