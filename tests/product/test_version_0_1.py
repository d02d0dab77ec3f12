"""Files of version 0.1 are read, and what they hold is what it was.

`fixtures/version_0_1/` was written by version 0.1 from a Llama of two layers, and `expected.safetensors` is what that
version computed from it. Another processor rounds sums otherwise, so logits are compared within a few units of fp32's
last place; what is stored is compared bit for bit.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toyrun import overrides, rows, run, toy_files
from transformers import AutoModelForCausalLM

from wrinklefree.config.compose import load_config
from wrinklefree.data.kd_cache.read import KDCache
from wrinklefree.models.load import load_model
from wrinklefree.packed.products.choose import exactly
from wrinklefree.thinking import loading

FOLDER = Path(__file__).parents[1] / "fixtures" / "version_0_1"
EXPECTED = load_file(FOLDER / "expected.safetensors")
IDS = torch.arange(24).reshape(2, 12) * 7 % 94


@pytest.mark.parametrize("name", ["packed_fairy2", "packed_anemll", "checkpoint_subln", "checkpoint_fairy2"])
def test_models_give_the_same_logits(name: str) -> None:
    model, _ = load_model(FOLDER / name, dtype=torch.float32)
    with torch.no_grad(), exactly(model):
        logits = model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, EXPECTED[name], rtol=1e-5, atol=1e-6)


def test_a_packed_folder_brings_its_loader() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "packed_fairy2", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad(), exactly(model):
        logits = model(IDS, use_cache=False).logits
    torch.testing.assert_close(logits, EXPECTED["packed_fairy2"], rtol=1e-5, atol=1e-6)


def test_a_kd_cache_gives_the_same_batches() -> None:
    batch = KDCache(FOLDER / "cache").batch("train", range(4))
    assert {f"cache.{name}" for name in batch} == {name for name in EXPECTED if name.startswith("cache.")}
    assert all(torch.equal(tensor, EXPECTED[f"cache.{name}"]) for name, tensor in batch.items())


def test_a_thinker_compresses_as_it_did() -> None:
    thinker, config = loading.load_thinker(FOLDER / "thinker")
    with torch.no_grad():
        states = thinker.compressor(torch.linspace(-1, 1, 64).reshape(2, 32))
    torch.testing.assert_close(states, EXPECTED["thinker"], rtol=1e-5, atol=1e-6)
    assert config.training.stage == "trm_compressor"


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With the data at another place: its name is part of the position, so the texts have to lie where they lay."""
    toy_files(tmp_path)
    given = [f"model.pretrained={FOLDER / 'checkpoint_fairy2'}", f"training.resume_from={FOLDER / 'checkpoint_fairy2'}"]
    config = load_config([*overrides(tmp_path), *given, "training.max_steps=4", "training.total_tokens=auto"])
    config.data.path = "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        run(config)
    assert [row["step"] for row in rows(tmp_path / "run")] == ["3", "4"]
