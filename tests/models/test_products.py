"""What a model multiplies with is found by what it does: in other classes, with turned weights, in experts."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, batches, family, ids, tokenizer, toy, with_toy_method
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, coverage, find, masters, quant_layers
from wrinklefree.core.products import output_head, role
from wrinklefree.core.stack import as_one
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.export.formats.packed import export_packed
from wrinklefree.export.proof.loader import prove
from wrinklefree.models.load import load_model
from wrinklefree.packed.products.choose import exactly
from wrinklefree.training import checkpoint

GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON: dict[str, Any] = {"ffn_hidden_size": 128}
MAMBA: dict[str, Any] = {"state_size": 16, "expand": 2, "time_step_rank": 8}
LLAMA4: dict[str, Any] = {"num_local_experts": 4, "intermediate_size_mlp": 96, "head_dim": 16, "num_key_value_heads": 2}
GPT_OSS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "falcon": FALCON,
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": GPT_OSS,
    "llama4_text": LLAMA4,
}


@pytest.fixture(autouse=True)
def _toy() -> Any:
    with with_toy_method():
        yield


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids(), use_cache=False).logits
    return found


def export(trained: PreTrainedModel, method: QuantMethod, folder: Path) -> None:
    text = batches()
    export_packed(trained, tokenizer(), method, folder, card="", force=False, batches=text, dense_dtype="float32")


@pytest.mark.parametrize("name", FAMILIES)
def test_nearly_all_weights_of_the_blocks_are_quantized(name: str) -> None:
    prepared = toy().prepare(family(name, **FAMILIES[name]))
    assert coverage(prepared).share > 0.9
    toy().check_coverage(prepared)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_may_be_opened_more_than_once(name: str) -> None:
    """A method looks at the layers before `prepare` does; GPT-2's are stored [in, out] all the same."""
    model = family(name, **FAMILIES[name])
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    toy().sites(model)
    after = {key: tensor.shape for key, tensor in toy().prepare(model).state_dict().items()}
    assert all(after.get(key, shape) == shape for key, shape in shapes.items())


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("turned", [True, False])
def test_a_rotated_model_is_saved_and_read_again(name: str, turned: bool, tmp_path: Path) -> None:
    method = find("uniform")(bits=2, rotate_inputs="auto" if turned else False)
    trained = method.prepare(family(name, **FAMILIES[name]))
    assert method.rotate_inputs is turned
    export(trained, method, tmp_path / "packed")
    read, _ = load_model(tmp_path / "packed", dtype=torch.float32)
    with exactly(read):
        torch.testing.assert_close(logits(read), logits(trained.eval()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prepared_model_multiplies_as_before(name: str) -> None:
    """With masters in the place of quantized weights, its logits are the original's."""
    original = family(name, **FAMILIES[name])
    expected = logits(original)
    prepared = toy().prepare(copy.deepcopy(original))
    with masters(quant_layers(prepared).values()):
        torch.testing.assert_close(logits(prepared), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(prepared), expected, atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_master_is_trained(name: str) -> None:
    prepared = toy().prepare(family(name, **FAMILIES[name])).train()
    prepared(
        input_ids=torch.arange(90).view(2, 45), labels=torch.arange(90).view(2, 45), use_cache=False
    ).loss.backward()
    assert not [fqn for fqn, layer in quant_layers(prepared).items() if layer.weight.grad is None]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_trained_is_packed_and_read(name: str, tmp_path: Path) -> None:
    method = toy()
    trained = method.prepare(family(name, **FAMILIES[name])).eval()
    export_packed(
        trained, tokenizer(), method, tmp_path / "p", card="", force=False, batches=batches(), dense_dtype="float32"
    )
    packed, _ = load_model(tmp_path / "p")
    with exactly(packed):
        torch.testing.assert_close(logits(packed), logits(trained), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(packed).argmax(-1), logits(trained).argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_a_folder_is_read_without_the_package(name: str, tmp_path: Path) -> None:
    method = toy()
    trained = method.prepare(family(name, **FAMILIES[name])).eval()
    export_packed(
        trained, tokenizer(), method, tmp_path / "p", card="", force=False, batches=batches(), dense_dtype="float32"
    )
    prove(tmp_path / "p", ids()[:1], logits(trained)[:1])


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gpt_oss"])
def test_plain_transformers_reads_the_masters_of_a_checkpoint(name: str, tmp_path: Path) -> None:
    """Weights [in, out] are quantized as [out, in] and saved as [in, out]. Experts are saved as one tensor again."""
    original = family(name, **FAMILIES[name])
    prepared = toy().prepare(copy.deepcopy(original))
    own, saved = original.state_dict(), as_one(prepared.state_dict(), prepared)
    assert all(torch.equal(saved[name], own[name]) for name in own)
    again = toy().prepare(family(name, **FAMILIES[name], initializer_range=0.3))
    checkpoint.save(tmp_path / "final", prepared, tokenizer(), "", None)
    checkpoint.load_weights(tmp_path / "final", again)
    torch.testing.assert_close(logits(again), logits(prepared))
    plain = type(original).from_pretrained(tmp_path / "final").eval()
    torch.testing.assert_close(logits(plain), logits(original))


def test_a_layer_that_is_never_called_stays_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """Mamba multiplies with the weight of `dt_proj` itself: a quantized layer there would change nothing."""
    prepared = toy().prepare(family("mamba", **MAMBA))
    assert not [fqn for fqn in quant_layers(prepared) if fqn.endswith("dt_proj")]
    assert [fqn for fqn in quant_layers(prepared) if fqn.endswith("in_proj")]
    assert "the model does not call these layers: backbone.layers.*.mixer.dt_proj" in caplog.text


def test_attention_to_an_encoder_that_is_not_there_is_packed_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """BART as a language model never uses a third of its blocks; nothing of it stays large, and nothing changes."""
    sizes: dict[str, Any] = {"d_model": 64, "decoder_layers": 2, "decoder_ffn_dim": 128, "decoder_attention_heads": 4}
    original = family("bart", **sizes, is_encoder_decoder=False)
    prepared = toy().prepare(copy.deepcopy(original))
    assert [fqn for fqn in quant_layers(prepared) if "encoder_attn" in fqn]
    assert coverage(prepared).share == 1
    assert "text alone does not use these layers: model.decoder.layers.*.encoder_attn.k_proj" in caplog.text
    with torch.no_grad():
        for fqn, layer in quant_layers(prepared).items():
            if "encoder_attn" in fqn:
                layer.weight.zero_()
    torch.testing.assert_close(logits(prepared), logits(toy().prepare(original)))


def test_a_weight_that_is_joined_with_others_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that multiplies with its three weights at once calls none of them, and needs them all."""

    def attend(self: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> tuple[torch.Tensor, None]:
        joined = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        return self.o_proj((hidden_states @ joined.T)[..., : self.o_proj.in_features]), None

    model = family("llama")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", attend)
    found = {role(fqn).rpartition(".")[2] for fqn in quant_layers(toy().prepare(model))}
    assert "o_proj" in found
    assert not found & {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize(("name", "values"), [("biogpt", {}), ("phi", {}), ("gpt_neox", {})])
def test_the_output_head_stays_as_it_is_under_any_name(name: str, values: dict[str, Any]) -> None:
    prepared = toy().prepare(family(name, **values))
    assert type(output_head(prepared)) is nn.Linear


def test_a_model_that_writes_into_its_weights_is_refused() -> None:
    """RWKV divides the weights of its blocks in evaluation, and multiplies them again in training."""
    with pytest.raises(UserError, match=r"RwkvForCausalLM: its forward pass writes into its weights \(rwkv.blocks"):
        toy().prepare(family("rwkv"))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_routers_and_gates_of_one_output_stay_as_they_are(name: str) -> None:
    prepared = toy().prepare(family(name))
    assert min(layer.out_features for layer in quant_layers(prepared).values()) > 4


def test_the_images_part_of_a_model_is_left_alone_and_does_not_count() -> None:
    """It may have more layers than the text's, as here, and more weights."""
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": VOCAB, "sliding_window": 16}
    images = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
    images |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    prepared = toy().prepare(Gemma3ForConditionalGeneration(config).eval())
    toy().check_coverage(prepared)
    assert coverage(prepared).share == 1
    assert decoder_layers(prepared) is prepared.model.language_model.layers
    assert all(fqn.startswith("model.language_model.layers.") for fqn in quant_layers(prepared))


def test_experts_that_few_tokens_do_not_see_are_quantized() -> None:
    prepared = toy().prepare(family("mixtral", num_local_experts=32))
    experts = [fqn for fqn in quant_layers(prepared) if ".experts." in fqn]
    assert len(experts) == 2 * 2 * 32


def test_too_little_is_refused_unless_it_is_asked_for() -> None:
    prepared = toy().prepare(family("dbrx", **DBRX))
    with pytest.raises(
        UserError, match=r"DbrxForCausalLM: .* % of the blocks' weights are quantized \(in full precision: "
    ):
        toy().check_coverage(prepared)
    toy(allow_partial=True).check_coverage(prepared)


DBRX: dict[str, Any] = {
    **{"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
    "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
}


def test_filters_of_a_convolution_are_no_experts() -> None:
    """Jamba's filters are as many as its MLP is wide; the MLP does not choose among them."""
    jamba = {"attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 128, "num_key_value_heads": 2}
    prepared = toy().prepare(family("jamba", **jamba, mamba_d_state=4, mamba_dt_rank=4, num_experts=4))
    assert [fqn for fqn in quant_layers(prepared) if fqn.endswith("feed_forward.gate_proj")]


def test_trained_scales_are_no_weights_of_blocks() -> None:
    method = find("fairy2")(name="fairy2", scale_granularity="row")
    assert coverage(method.prepare(family("llama"))).share == 1.0


def test_what_the_user_excludes_does_not_count_as_missing() -> None:
    method = toy(exclude_names=["embed_tokens", "lm_head", "layers.0"])
    method.check_coverage(method.prepare(family("llama")))
