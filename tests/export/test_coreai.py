"""The Core AI asset: what lies on the disk is what was trained, and Core AI's own runtime gives the trained logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ids, llama, qwen, tokenizer
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.export.formats import coreai
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.export.views.decoder import attention_sizes
from wrinklefree.export.views.lut import palettes
from wrinklefree.methods import anemll, bitdistill, fairy2

BATCHES = [{"input_ids": ids(1, 20)}]
WORDS = tokenizer()


@pytest.fixture(autouse=True)
def short_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that 20 ids go through both functions."""
    monkeypatch.setattr(coreai, "PREFILL", 16)


def needs_coreai() -> None:
    pytest.importorskip("coreai_torch", reason="the extra [coreai] is not installed: make test-coreai")


def table_model(model: PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """2 bits and rank 1 in the MLP, 4 bits and rank 4 in attention, if not told otherwise."""
    prepared = anemll.Config(**{"bits": 2, "rank": 1, "attn_rank": 4, "als_iterations": 1} | settings).prepare(model)
    assert isinstance(prepared, PreTrainedModel)
    for name, p in prepared.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return prepared.eval()


def write(model: PreTrainedModel, folder: Path, **settings: Any) -> dict[str, str]:
    needs_coreai()
    return dict(coreai.write(model, WORDS, folder, BATCHES, **settings))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, grouped heads": lambda: table_model(llama(num_key_value_heads=2)),
    "llama, 3 bits": lambda: table_model(llama(num_hidden_layers=1), bits=3, attn_bits=3),
    "qwen2, biases, and a quantized head": lambda: table_model(
        qwen(num_hidden_layers=1), exclude_names=["embed_tokens"]
    ),
    "ternary, SubLN": lambda: bitdistill.Config(activation_bits=None).prepare(llama(num_hidden_layers=1)).eval(),
}


@pytest.mark.parametrize("name", MODELS)
def test_core_ais_runtime_gives_the_trained_logits(name: str, tmp_path: Path) -> None:
    table = write(MODELS[name](), tmp_path)
    assert float(table["KL(trained, exported), nats"]) < 1e-5
    count, total = table["layers with identical codes"].split(" of ")
    assert count == total
    assert {path.name for path in tmp_path.iterdir()} >= {"model.aimodel", "tokenizer.json"}


def test_codes_are_stored_packed_and_once(tmp_path: Path) -> None:
    """All constants of both functions together are no larger than packed codes and fp16 numbers."""
    model = table_model(llama(num_hidden_layers=1), attn_rank=1)
    write(model, tmp_path)
    layers = palettes(model, "coreai")
    found = coreai.check_constants(tmp_path / "model.aimodel", layers, 8)
    quantized = sum(size for layer in layers.values() for _, size in layer.constants())
    sizes = attention_sizes(model)
    rest = model.model.embed_tokens.weight.numel() + 3 * 2 * model.config.hidden_size  # gains are fp32
    assert found < quantized + 2 * (rest + 2 * sizes.context * sizes.head_dim) + 2000  # of shapes and positions


def test_another_code_or_scale_is_noticed_and_baked_weights_are_compared(tmp_path: Path) -> None:
    model = table_model(llama(num_hidden_layers=1), rank=6, attn_rank=1)
    assert write(model, tmp_path, factored_rank=4)["layers with identical codes"] == "4 of 7"
    asset, layers = tmp_path / "model.aimodel", palettes(model, "coreai")
    for fqn, part in (("self_attn.q_proj", "index"), ("self_attn.v_proj", "a"), ("mlp.up_proj", "lut")):
        changed = getattr(layers[f"model.layers.0.{fqn}"], part).flatten()
        kept = changed[1].clone()
        changed[1] = 1 - changed[1] if part == "index" else changed[1] * 2 + 1
        with pytest.raises(CertificateError, match=rf"{fqn}: codes, table or scales differ"):
            coreai.check_constants(asset, layers, 4)
        changed[1] = kept
    coreai.check_constants(asset, layers, 4)


def test_a_program_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign error in the rotation, which no code shows."""
    needs_coreai()
    from wrinklefree.export.coreai import program

    right = program.rotated
    monkeypatch.setattr(program, "rotated", lambda x, turn: right(x, (turn[0], -turn[1])))
    with pytest.raises(CertificateError, match="KL to the trained model"):
        write(table_model(llama(num_hidden_layers=1, initializer_range=0.2)), tmp_path)


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "complex codes": (lambda: fairy2.Config().prepare(llama()), "(fairy2) is not a table times low-rank scales"),
    "another activation": (lambda: table_model(llama(hidden_act="relu2")), "activation relu2"),
    "nothing quantized": (llama, "nothing in this model is quantized"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_program_cannot_hold_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(UserError) as refused:
        coreai.write(make(), WORDS, tmp_path, BATCHES)
    assert str(refused.value).startswith("--format coreai: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)
