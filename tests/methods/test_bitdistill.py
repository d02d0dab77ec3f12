"""BitDistill: the ternary quantizer, its norms, and what becomes of a model that is prepared."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import ids, llama, qwen
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetForCausalLM, LlamaForCausalLM

from wrinklefree.core.errors import UserError
from wrinklefree.core.inputs import int8_per_token
from wrinklefree.core.method import quant_layers
from wrinklefree.families.bitnet import from_llama
from wrinklefree.methods.bitdistill import Config, TernaryLinear, gains, norm_mode

pytestmark = pytest.mark.numeric

BATCHES = [{"input_ids": ids(8, 32)}]


def layer(weight: Tensor, **settings: object) -> TernaryLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    return TernaryLinear(linear, Config(**settings))  # type: ignore[arg-type]


def weights(rows: int = 48, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


def test_codes_and_scale_are_the_papers() -> None:
    weight = weights()
    codes = layer(weight).encode()
    scale = weight.abs().mean()
    assert torch.equal(codes.index.float() - 1, (weight / scale).round().clamp(-1, 1))
    assert codes.tensors["scales"].item() == pytest.approx(scale.item(), rel=2**-11)
    assert set(codes.index.unique().tolist()) == {0, 1, 2}


def test_entries_below_half_the_scale_become_zero() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.49, -0.49, -1.0, -2.02]])  # mean of absolute values 1
    assert (layer(weight).encode().index - 1).to(torch.int8).tolist() == [[1, 1, 0, 0, -1, -1]]


@pytest.mark.parametrize(("granularity", "shape"), [("tensor", (1, 1)), ("row", (48, 1)), ("group", (48, 4))])
def test_each_granularity_has_its_own_means(granularity: str, shape: tuple[int, int]) -> None:
    weight = weights() * torch.arange(1, 49).unsqueeze(1)
    codes = layer(weight, granularity=granularity, group_size=16).encode()
    assert codes.tensors["scales"].shape == shape
    rows = 48 if granularity == "tensor" else 1
    blocks = weight.reshape(48 // rows, rows, shape[1], -1)
    expected = blocks.abs().mean(dim=(1, 3)) if rows == 48 else blocks.squeeze(1).abs().mean(-1)
    torch.testing.assert_close(codes.tensors["scales"], expected, rtol=2**-10, atol=0)


def test_groups_have_to_fill_the_rows() -> None:
    with pytest.raises(UserError, match="group_size=48"):
        layer(weights(), granularity="group", group_size=48).encode()


def test_learned_scales_start_at_the_least_squares_ones() -> None:
    weight = weights()
    ours, paper = (layer(weight, scale_mode=mode, granularity="row") for mode in ("learned", "absmean"))
    errors = [(weight - x.decode(x.encode())).square().sum(1) for x in (ours, paper)]
    assert (errors[0] <= errors[1] + 1e-4).all()
    assert errors[0].sum() < 0.9 * errors[1].sum()
    (ours.effective_weight(torch.float32) * weight).sum().backward()
    assert ours.log_scales.grad.abs().min() > 0


def test_codes_come_from_fp32_arithmetic_on_a_bf16_master() -> None:
    """The same codes as of the same numbers in fp32; a mean taken in bf16 would move 0.2 % of them."""
    weight = weights(256, 256).bfloat16()
    in_bf16 = (weight / weight.abs().mean()).round().clamp(-1, 1).float()
    codes = layer(weight).encode()
    assert torch.equal(codes.index, layer(weight.float()).encode().index)
    assert not torch.equal(codes.index.float() - 1, in_bf16)


def test_the_straight_through_gradients() -> None:
    ternary = layer(weights())
    x = torch.randn(5, 64, requires_grad=True)
    ternary(x).sum().backward()
    inputs = int8_per_token(x.detach())
    torch.testing.assert_close(ternary.weight.grad, inputs.sum(0).expand(48, -1))
    torch.testing.assert_close(x.grad, ternary.decode(ternary.encode()).sum(0).expand(5, -1))


# --- the norms


@torch.no_grad()
def kl(model: nn.Module, original: nn.Module) -> float:
    p, q = (m(ids(8, 32)).logits.log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Weights and activations as they are: what the norms alone do."""
    layers = quant_layers(model)
    for fqn, quantized in layers.items():
        plain = nn.Linear(quantized.in_features, quantized.out_features, quantized.bias is not None)
        plain.weight, plain.bias = quantized.weight, quantized.bias
        norm = quantized.rms_norm
        model.set_submodule(fqn, plain if norm is None else nn.Sequential(norm, plain))
    yield
    for fqn, quantized in layers.items():
        model.set_submodule(fqn, quantized)


def uneven(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Channels of unequal size before the last projections, as trained models have."""
    for block in model.model.layers:
        block.self_attn.v_proj.weight.data *= torch.linspace(0.2, 8, 64).unsqueeze(1)
        block.mlp.up_proj.weight.data *= torch.linspace(0.2, 20, 96).unsqueeze(1)
    return model


@pytest.mark.parametrize("norm", ["subln", "per_linear"])
def test_calibrated_norms_change_the_model_less_than_ones(norm: str) -> None:
    original = uneven(llama())
    damage = {}
    for init in ("calibrated", "ones"):
        prepared = Config(norm_mode=norm, subln_init=init).prepare(copy.deepcopy(original), BATCHES)
        with full_precision(prepared):
            damage[init] = kl(prepared, original)
    assert damage["calibrated"] < 0.5 * damage["ones"]


def test_gains_are_the_least_squares_fit() -> None:
    model = llama()
    site = model.model.layers[1].mlp.down_proj
    seen = []
    handle = site.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().flatten(0, 1)))
    fitted = gains(model, {"x": site}, BATCHES)["x"]
    handle.remove()
    x = seen[0].double()
    unit = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    for channel in (0, 50, 95):
        expected = torch.linalg.lstsq(unit[:, channel : channel + 1], x[:, channel : channel + 1]).solution
        assert fitted[channel].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_llama_with_subln_is_transformers_bitnet() -> None:
    prepared = Config().prepare(llama(), BATCHES)
    assert type(prepared) is BitNetForCausalLM
    assert len(quant_layers(prepared)) == 14
    assert all(x.rms_norm is None for x in quant_layers(prepared).values())
    names = {name.rpartition(".")[2] for name, _ in prepared.named_modules()}
    assert {"attn_sub_norm", "ffn_sub_norm"} <= names
    assert prepared.model.embed_tokens.weight is prepared.lm_head.weight


def test_bitnet_without_its_norms_is_the_llama() -> None:
    original = llama(num_key_value_heads=2)
    bitnet = from_llama(copy.deepcopy(original))
    for block in bitnet.model.layers:
        block.self_attn.attn_sub_norm = block.mlp.ffn_sub_norm = nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(bitnet(ids()).logits, original(ids()).logits, atol=1e-6, rtol=1e-5)


def test_other_architectures_get_norms_inside_of_the_layers() -> None:
    prepared = Config().prepare(qwen(), BATCHES)
    normed = {fqn.rpartition(".")[2] for fqn, x in quant_layers(prepared).items() if x.rms_norm is not None}
    assert normed == {"o_proj", "down_proj"}
    assert norm_mode(prepared) == "subln"
    assert prepared(ids()).logits.isfinite().all()


@pytest.mark.parametrize("norm", ["subln", "per_linear", "none"])
def test_preparing_twice_changes_nothing(norm: str) -> None:
    config = Config(norm_mode=norm)
    once = config.prepare(uneven(llama()), BATCHES)
    before = {name: tensor.clone() for name, tensor in once.state_dict().items()}
    modules = [name for name, _ in once.named_modules()]
    twice = config.prepare(once, [{"input_ids": ids(2, 5)}])
    assert twice is once
    assert [name for name, _ in twice.named_modules()] == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in twice.state_dict().items())


def test_a_prepared_model_takes_new_settings_but_not_other_norms() -> None:
    model = Config().prepare(llama())
    Config(granularity="row", activation_bits=None).prepare(model)
    assert all(x.encode().tensors["scales"].shape == (x.out_features, 1) for x in quant_layers(model).values())
    with pytest.raises(UserError, match="norm_mode=none: this model was prepared with subln"):
        Config(norm_mode="none").prepare(model)


def test_a_bitnet_keeps_the_norms_it_came_with() -> None:
    bitnet = from_llama(llama())
    gain = bitnet.model.layers[0].mlp.ffn_sub_norm.weight
    gain.data.fill_(3.0)
    prepared = Config().prepare(bitnet, BATCHES)
    assert prepared.model.layers[0].mlp.ffn_sub_norm.weight is gain
    assert gain.unique().tolist() == [3.0]
    with pytest.raises(UserError, match="norm_mode=none: a BitNet has its norms already"):
        Config(norm_mode="none").prepare(from_llama(llama()))


def test_norm_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"norm_names=\['dense'\]: no such linear layer in LlamaForCausalLM"):
        Config(norm_names=["dense"]).prepare(llama())


# --- the warm-up


def test_warm_up_goes_from_full_precision_to_ternary() -> None:
    config = Config(norm_mode="none", weight_warmup_steps=4, activation_warmup_steps=2)
    original = llama()
    model = config.prepare(copy.deepcopy(original)).train()
    config.on_step(model, 0)
    torch.testing.assert_close(model(ids()).logits, original(ids()).logits, atol=1e-6, rtol=1e-5)
    first = quant_layers(model)["model.layers.0.mlp.up_proj"]
    assert isinstance(first, TernaryLinear)
    ternary = first.decode(first.encode())
    config.on_step(model, 1)
    torch.testing.assert_close(first.quantized_weight(), first.weight + 0.25 * (ternary - first.weight))
    x = torch.randn(3, 64)
    torch.testing.assert_close(first.inputs(x), x + 0.5 * (int8_per_token(x) - x))
    config.on_step(model, 4)
    assert torch.equal(first.effective_weight(torch.float32), ternary)
    assert torch.equal(first.inputs(x), int8_per_token(x))


def test_evaluation_is_always_fully_quantized() -> None:
    config = Config(norm_mode="none", weight_warmup_steps=4, activation_warmup_steps=4)
    model = config.prepare(llama()).train()
    config.on_step(model, 0)
    model.eval()
    plain = Config(norm_mode="none").prepare(llama())
    assert torch.equal(model(ids()).logits, plain(ids()).logits)


def test_cosine_warm_up_starts_and_ends_where_linear_does() -> None:
    linear, cosine = (Config(weight_warmup_steps=8, warmup_shape=shape) for shape in ("linear", "cosine"))
    shares = [[config._share(step, 8) for step in (0, 2, 4, 8)] for config in (linear, cosine)]
    assert shares[0] == [0, 0.25, 0.5, 1]
    assert shares[1] == pytest.approx([0, 0.146447, 0.5, 1], abs=1e-6)


# --- the folder


@pytest.mark.parametrize("norm", ["subln", "per_linear", "none"])
def test_plain_transformers_opens_the_checkpoint_and_quantizes_it(
    norm: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("native")
    model = Config(norm_mode=norm).prepare(uneven(llama()), BATCHES).eval()
    model.save_pretrained(folder)
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(native.model.layers[0].mlp.up_proj).__name__ == "AutoBitLinear"
    # Its rounding would be compiled: for minutes of all such tests, and with the instructions of this machine.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        difference = (native(ids()).logits - model(ids()).logits).abs().max() / model(ids()).logits.abs().max()
    assert difference < 0.02  # it takes the scale before its rounding to fp16, and int8 may then round the other way


def test_a_model_that_transformers_cannot_express_does_not_pretend() -> None:
    for settings in ({"granularity": "row"}, {"activation_bits": None}, {"scale_mode": "learned"}):
        assert "quantization_config" not in Config(**settings).prepare(llama()).config.to_dict()
    assert "quantization_config" not in Config().prepare(qwen()).config.to_dict()
