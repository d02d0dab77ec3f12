"""A model run block by block gives what it gives as a whole."""

import pytest
import torch
from tiny import VOCAB, llama, qwen
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from wrinklefree.core.surgery import decoder_layers
from wrinklefree.reconstruction import blocks

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCAB}
FAMILIES = {
    "gpt_neox": {"intermediate_size": 64},
    "gemma3_text": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "phi3": {"intermediate_size": 64, "pad_token_id": 0},
}


def of_family(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | FAMILIES[kind]))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


MODELS = {"llama": llama, "qwen": qwen, **{kind: (lambda kind=kind: of_family(kind)) for kind in FAMILIES}}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_block_by_block_is_the_model(kind: str) -> None:
    model = MODELS[kind]()
    batch = {"input_ids": torch.arange(24).reshape(2, 12) % VOCAB}
    whole = model.base_model(**batch, output_hidden_states=True, use_cache=False).hidden_states
    hidden = blocks.first_inputs(model, batch)
    torch.testing.assert_close(hidden, whole[0])
    for number, block in enumerate(list(decoder_layers(model))[:-1]):
        hidden = blocks.call(block, hidden, blocks.arguments(model, batch, number))
        torch.testing.assert_close(hidden, whole[number + 1])


def test_the_model_keeps_its_blocks_if_it_fails() -> None:
    model = llama()
    before = list(decoder_layers(model))
    with pytest.raises(IndexError):
        blocks.first_inputs(model, {"input_ids": torch.tensor([[VOCAB + 1]])})
    assert list(decoder_layers(model)) == before
