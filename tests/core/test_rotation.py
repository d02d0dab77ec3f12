"""Inputs and weights turn together: nothing changes but what rounding makes of them, in files and exports too."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import batches, ids, llama, qwen, shipped_methods, tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, find, masters, quant_layers
from wrinklefree.core.rotation import rotated, rotation_block
from wrinklefree.export.formats import anemll, gguf
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.export.views.dense import dense_model, rotated_back
from wrinklefree.models.load import load_model
from wrinklefree.packed.products.choose import set_exact
from wrinklefree.packed.quantizer import FORMAT

pytestmark = pytest.mark.numeric

METHODS = {method.name: replace(method, rotate_inputs=True) for method in shipped_methods()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize(("width", "block"), [(1, 1), (6, 1), (77, 1), (36, 4), (64, 64), (576, 64), (1536, 256)])
def test_a_rotation_keeps_lengths_and_can_be_undone(width: int, block: int) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    assert rotation_block(width) == block
    turned = rotated(x)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(rotated_back(turned), x)
    eye = rotated(torch.eye(width))
    torch.testing.assert_close(x @ eye, turned)
    assert ((eye.abs() * block**0.5 - 1).abs() < 1e-6).sum() == width * block  # exact powers of two, bf16 holds them
    assert torch.equal(eye, eye.bfloat16().float())


def test_a_large_channel_is_spread() -> None:
    x = torch.zeros(1, 576)
    x[0, 100] = 80.0
    assert rotated(x).abs().max() == 10.0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", [llama, qwen])
def test_without_rounding_nothing_changes(name: str, base: type[PreTrainedModel]) -> None:
    method = METHODS[name]
    if name == "bitdistill":
        method = replace(method, activation_bits=None, norm_mode="none")
    model = method.prepare(base(), batches())
    with masters(quant_layers(model).values()):
        torch.testing.assert_close(logits(model), logits(base()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bitdistill", "uniform"])
def test_outliers_cost_less(name: str) -> None:
    """A large channel costs methods less that have no scales of their own for columns."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(256, 64, bias=False)
    linear.weight.data = torch.randn(64, 256, generator=generator)
    linear.weight.data[:, 7] *= 8
    x = torch.randn(512, 256, generator=generator)
    x[:, 7] *= 8
    expected = linear(x).detach()

    def lost(method: QuantMethod) -> float:
        layer = nn.Linear(256, 64, bias=False)
        layer.weight.data = linear.weight.data.clone()
        with torch.no_grad():
            return (method.prepare(nn.ModuleList([layer]))[0](x) - expected).square().mean().item()

    plain = replace(METHODS[name], rotate_inputs=False)
    if name == "bitdistill":
        plain = replace(plain, norm_mode="none")
    assert lost(replace(plain, rotate_inputs=True)) < 0.7 * lost(plain)


@pytest.mark.parametrize("name", METHODS)
def test_a_packed_folder_is_the_trained_model(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    trained = method.prepare(llama(), batches())
    export_packed(
        trained, tokenizer(), method, tmp_path / "p", card="", force=False, batches=batches(), dense_dtype="float32"
    )
    ours = load_model(tmp_path / "p", dtype=torch.float32)[0]
    assert ours.config.quantization_config.format == FORMAT
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "p", trust_remote_code=True, dtype=torch.float32)
    set_exact(ours)
    torch.testing.assert_close(logits(theirs.eval()), logits(ours), atol=1e-6, rtol=1e-6)
    if name != "fairy2":  # whose scales move a little when it is packed
        torch.testing.assert_close(logits(ours), logits(trained.eval()), atol=1e-5, rtol=1e-5)


def test_a_dense_model_turns_back() -> None:
    trained = METHODS["fairy2"].prepare(llama())
    plain = llama()
    plain.load_state_dict(dense_model(trained).state_dict())
    torch.testing.assert_close(logits(plain), logits(trained.eval()), atol=1e-5, rtol=1e-4)


def test_formats_without_a_place_for_it_refuse(tmp_path: Path) -> None:
    ternary = replace(METHODS["bitdistill"], norm_mode="none", granularity="row")
    with pytest.raises(UserError, match="rotate_inputs"):
        gguf.write(ternary.prepare(llama()), tokenizer(), tmp_path / "g", batches())
    with pytest.raises(UserError, match="rotate_inputs"):
        anemll.write(METHODS["anemll"].prepare(llama()), tokenizer(), tmp_path / "a", batches())
    with pytest.raises(ValueError, match="rotate_inputs"):
        find("anemll")(rotate_inputs=True, view="v2", forward="factored")


def test_a_weight_that_is_shared_stays() -> None:
    with pytest.raises(UserError, match="lm_head shares its weight"):
        replace(METHODS["fairy2"], exclude_names=[]).prepare(llama())


def test_another_view_keeps_the_weight() -> None:
    model = METHODS["anemll"].prepare(llama(), batches())
    before = logits(model)
    torch.testing.assert_close(logits(replace(METHODS["anemll"], view="v2").prepare(model)), before)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("turned", [True, False])
def test_a_quantized_model_keeps_its_rotation(name: str, turned: bool) -> None:
    model = replace(METHODS[name], rotate_inputs=turned).prepare(llama(), batches())
    with pytest.raises(UserError, match="rotate_inputs"):
        replace(METHODS[name], rotate_inputs=not turned).prepare(model, batches())


@pytest.mark.parametrize("name", METHODS)
def test_auto_is_as_the_model_was_trained_and_else_yes(name: str) -> None:
    fresh = replace(METHODS[name], rotate_inputs="auto")
    model = fresh.prepare(llama(), batches())
    assert fresh.rotate_inputs is True
    for turned in (True, False):
        model = replace(METHODS[name], rotate_inputs=turned).prepare(llama(), batches())
        again = replace(METHODS[name], rotate_inputs="auto")
        again.prepare(model, batches())
        assert again.rotate_inputs is turned


def test_auto_leaves_shared_weights_as_they_are() -> None:
    method = replace(METHODS["fairy2"], rotate_inputs="auto", exclude_names=[])
    method.prepare(llama(tie_word_embeddings=True))
    assert method.rotate_inputs is False


def test_the_papers_preset_does_not_rotate() -> None:
    assert replace(METHODS["fairy2"], rotate_inputs="auto", preset="paper").rotate_inputs is False


def test_a_model_trains_after_it_was_used_for_inference() -> None:
    model = METHODS["fairy2"].prepare(llama())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(ids())
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids()).logits.sum().backward()
    assert model.model.layers[0].mlp.down_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("turned", [True, False])
def test_only_checkpoints_that_plain_transformers_understands_are_marked_for_it(turned: bool) -> None:
    model = replace(METHODS["bitdistill"], rotate_inputs=turned).prepare(llama(), batches())
    assert hasattr(model.config, "quantization_config") != turned
