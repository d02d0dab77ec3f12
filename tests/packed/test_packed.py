"""Packed layers and the transformers plug-in: what was trained is what is read back, whatever the model is cast to."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import batches, ids, llama, qwen, shipped_methods, tokenizer, toy, with_toy_method
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from wrinklefree.core import library
from wrinklefree.core.codes import Codes
from wrinklefree.core.method import find, quant_layers
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.export.proof.certify import same_codes
from wrinklefree.packed.layer import LayerSpec, PackedLinear
from wrinklefree.packed.pack import pack_layer, packed_layers
from wrinklefree.packed.products import native
from wrinklefree.packed.products.choose import exactly, set_exact
from wrinklefree.packed.products.fused import FusedMLP, FusedNorm
from wrinklefree.packed.quantizer import FORMAT, WrinkleFreeConfig

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _method() -> Iterator[None]:
    with with_toy_method():
        yield


TRAINED = {"tied": lambda: toy().prepare(llama()), "biased": lambda: toy(int8=True).prepare(qwen())}
TRAINED |= {m.name: lambda m=m: m.prepare(qwen()) for m in shipped_methods()}


@pytest.fixture(scope="module", params=TRAINED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A trained model and its packed folder, everything in fp32."""
    trained = TRAINED[request.param]()
    method = next(iter(quant_layers(trained).values())).config
    folder = tmp_path_factory.mktemp(request.param) / "packed"
    options = {"card": "", "force": False, "batches": batches(), "dense_dtype": "float32", "snap_scales": False}
    export_packed(trained, tokenizer(), method, folder, **options)
    return trained, folder


def read(folder: Path, **options: object) -> PreTrainedModel:
    """Without kernels, whose rounding of activations is theirs: tests/test_kernels.py."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    set_exact(model)
    return model


def scale_bits(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every buffer of every packed layer as raw bytes."""
    return {
        f"{fqn}.{name}": buffer.cpu().contiguous().view(torch.uint8)
        for fqn, layer in packed_layers(model).items()
        for name, buffer in layer.named_buffers()
    }


def assert_same_bits(a: PreTrainedModel, b: PreTrainedModel) -> None:
    left, right = scale_bits(a), scale_bits(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.numeric
@torch.no_grad()
def test_packed_equals_trained_bit_for_bit(pair: tuple[PreTrainedModel, Path]) -> None:
    trained, folder = pair
    packed = read(folder)
    layers = packed_layers(packed)
    assert layers.keys() == quant_layers(trained).keys()
    assert all(same_codes(layer.encode(), layers[fqn].codes()) for fqn, layer in quant_layers(trained).items())
    assert torch.equal(packed(ids()).logits, trained(ids()).logits)


def test_generate_gives_the_same_tokens(pair: tuple[PreTrainedModel, Path]) -> None:
    trained, folder = pair
    prompt, options = ids(1, 5), {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(read(folder).generate(prompt, **options), trained.generate(prompt, **options))


def test_save_and_reload_again_is_identical(pair: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    packed = read(pair[1])
    packed.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert_same_bits(packed, again)
    assert torch.equal(packed(ids()).logits, again(ids()).logits)
    assert "auto_map" not in (tmp_path / "again" / "config.json").read_text()  # the loader was not copied


def test_tied_embeddings_stay_tied(pair: tuple[PreTrainedModel, Path]) -> None:
    packed = read(pair[1])
    assert (packed.lm_head.weight is packed.model.embed_tokens.weight) == packed.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_keep_codes_and_scales(pair: tuple[PreTrainedModel, Path], dtype: torch.dtype) -> None:
    packed = read(pair[1])
    reference = copy.deepcopy(packed)
    assert_same_bits(read(pair[1], dtype=dtype), reference)
    assert_same_bits(packed.to(dtype), reference)
    assert packed.model.embed_tokens.weight.dtype == dtype
    layer = next(iter(packed_layers(packed).values()))
    assert layer.bias is None or layer.bias.dtype == dtype
    assert torch.equal(
        layer.effective_weight(torch.float32),
        next(iter(packed_layers(reference).values())).effective_weight(torch.float32),
    )
    assert packed(ids()).logits.dtype == dtype


def test_half_float_and_type_keep_codes_and_scales(pair: tuple[PreTrainedModel, Path]) -> None:
    packed = read(pair[1])
    reference = copy.deepcopy(packed)
    for layer in packed_layers(packed).values():  # transformers forbids some of these on whole quantized models
        layer.half().bfloat16().double().type(torch.bfloat16)
    assert_same_bits(packed, reference)


def test_moves_to_other_devices_still_work(pair: tuple[PreTrainedModel, Path]) -> None:
    layer = next(iter(packed_layers(read(pair[1], device_map="cpu")).values()))
    layer(torch.zeros(1, layer.in_features))
    assert layer.dense is not None
    moved = layer.to("meta")
    assert moved.dense is None
    assert {buffer.device.type for buffer in moved.buffers()} == {"meta"}
    assert moved.weight.dtype == torch.uint8


@pytest.mark.numeric
def test_bf16_output_is_near_the_fp32_one(pair: tuple[PreTrainedModel, Path]) -> None:
    expected, got = read(pair[1])(ids()).logits, read(pair[1], dtype=torch.bfloat16)(ids()).logits
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() / expected.norm() < 0.03


def test_decodes_once_and_again_after_new_codes() -> None:
    codes = Codes(torch.tensor([[0, 1, 2, 1, 0]], dtype=torch.uint8), 2, {"scales": torch.tensor([[0.5]])}, (1, 5))
    codes.tensors["table"] = torch.tensor([-1.0, 0.0, 1.0, 0.0])
    layer = pack_layer(PackedLinear, toy(), codes)
    x = torch.eye(5)
    assert layer(x).flatten().tolist() == [-0.5, 0.0, 0.5, 0.0, -0.5]
    first = layer.dense
    assert layer(x) is not None
    assert layer.dense is first
    layer.load_state_dict(layer.state_dict() | {"scales": torch.tensor([[2.0]])})
    assert layer(x).flatten().tolist() == [-2.0, 0.0, 2.0, 0.0, -2.0]


def test_first_use_under_inference_mode_does_not_spoil_gradients() -> None:
    trained = toy().prepare(llama())
    layer = pack_layer(PackedLinear, toy(), quant_layers(trained)["model.layers.0.mlp.up_proj"].encode())
    x = torch.ones(2, 64, requires_grad=True)
    with torch.inference_mode():
        layer(torch.ones(2, 64))
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_autocast_multiplies_in_its_dtype(pair: tuple[PreTrainedModel, Path]) -> None:
    layer = next(iter(packed_layers(read(pair[1])).values()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, layer.in_features)).dtype == torch.bfloat16


def test_a_scale_that_fp16_cannot_hold_is_refused() -> None:
    codes = Codes(torch.zeros(1, 4, dtype=torch.uint8), 2, {"scales": torch.tensor([0.1])}, (1, 4))
    with pytest.raises(ValueError, match="scales: not representable in fp16"):
        pack_layer(PackedLinear, toy(), codes)


@pytest.mark.parametrize(("bits", "expected"), [(1, 2), (2, 3), (4, 5), (8, 9)])
def test_an_odd_width_takes_the_bytes_it_needs(bits: int, expected: int) -> None:
    assert LayerSpec([3, 9], bits, [3, 9], {}, False).packed_shape == [3, expected]


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(ValueError, match="upgrade"):
        WrinkleFreeConfig({"name": "toy"}, {}, format=FORMAT + 1)


IMPORT_ORDERS = {
    "package first": "import wrinklefree; assert 'torch' not in sys.modules; import transformers.quantizers.auto as a",
    "transformers first": "import transformers.quantizers.auto as a; import wrinklefree",
    "plug-in first": "import wrinklefree.packed.layer; import transformers.quantizers.auto as a",
}


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_import_registers_the_plug_in_in_any_order(order: str) -> None:
    check = "assert a.AUTO_QUANTIZER_MAPPING['wrinklefree'] and a.AUTO_QUANTIZATION_CONFIG_MAPPING['wrinklefree']"
    subprocess.run([sys.executable, "-c", f"import sys; {IMPORT_ORDERS[order]}; {check}"], check=True, timeout=60)


@pytest.mark.numeric
@pytest.mark.parametrize("norm_mode", ["none", "subln", "per_linear"])
@torch.no_grad()
def test_a_known_mlp_works_in_two_products_with_the_bits_of_its_layers(
    norm_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But layer by layer where one has a norm of its own, where products are to be exact, and for a gradient."""
    if library.available() is not None:
        pytest.skip("no native library")
    method = find("bitdistill")(name="bitdistill", norm_mode=norm_mode)
    export_packed(method.prepare(llama()), tokenizer(), method, tmp_path / "p", card="", force=False, batches=batches())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "p", dtype=torch.float32).eval()
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 64)
    calls: list[int] = []
    monkeypatch.setattr(
        "wrinklefree.packed.products.fused.matmul", lambda m, x: calls.append(len(m)) or native.matmul(m, x)
    )
    kind = BitNetMLP if norm_mode == "subln" else LlamaMLP
    assert isinstance(mlp, kind)
    by_layers = kind.forward(mlp, x)
    assert torch.equal(mlp(x), by_layers)
    assert calls == ([] if norm_mode == "per_linear" else [2, 1])
    with torch.inference_mode():
        assert torch.equal(mlp(x.clone()), by_layers)
    calls.clear()
    seen: list[int] = []
    handle = mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(mlp(x), by_layers)
    handle.remove()
    assert seen == [1]
    with exactly(model):
        assert not torch.equal(mlp(x), by_layers)
    with torch.enable_grad():
        assert mlp(x.requires_grad_()).requires_grad
    assert calls == []
    half = mlp(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), by_layers, rtol=0.1, atol=0.1 * float(by_layers.abs().max()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.model.layers[0].mlp, FusedMLP)
        assert torch.equal(twin(ids()).logits, model(ids()).logits)


@pytest.mark.numeric
@torch.no_grad()
def test_known_norms_are_one_call_in_fp32_and_their_own_otherwise(pair: tuple[PreTrainedModel, Path]) -> None:
    if library.available() is not None:
        pytest.skip("no native library")
    model = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32).eval()
    norm = model.model.norm
    assert isinstance(norm, FusedNorm)
    norm.weight.copy_(torch.randn(64))
    norm.weight.requires_grad_()
    own = type(norm).__bases__[1].forward
    for x in (torch.randn(2, 3, 64), torch.randn(64, 5).T, torch.zeros(1, 64), 1e12 * torch.randn(4, 64)):
        torch.testing.assert_close(norm(x), own(norm, x), rtol=2e-6, atol=1e-7)
        with exactly(model):
            assert torch.equal(norm(x), own(norm, x))
    half = torch.randn(2, 64).bfloat16()
    assert torch.equal(norm(half), own(norm, half))
    with pytest.raises(ValueError, match="does not fit"):
        norm(torch.randn(2, 65))
    with torch.enable_grad():
        assert norm(torch.randn(2, 64)).requires_grad
