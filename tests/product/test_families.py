"""The census in short: the whole product on nine families. Each is whole, or refused in one line that says why."""

from pathlib import Path

import pytest

from benchmarks.families import product, small, table
from wrinklefree.core.errors import UserError

WHOLE = ("llama", "gpt2", "phi", "gemma", "falcon", "mixtral", "mamba", "opt", "zamba2")


@pytest.fixture
def _leave_out_what_others_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product.speed, "SPEED_TOKENS", 4)
    monkeypatch.setattr(product.stage, "NUM_SAMPLES", 1)


@pytest.mark.usefixtures("_leave_out_what_others_test")
@pytest.mark.parametrize("family", WHOLE)
def test_a_family_is_whole(family: str, tmp_path: Path) -> None:
    """Trained, packed, read back, generated from, resumed, exported; nothing is wrong in silence; the share is said."""
    result = product.Result(family)
    product.run_family(family, tmp_path, result)
    assert result.silent == []
    assert not result.unreadable
    assert result.share >= 0.9
    card = (tmp_path / "run" / "packed" / "README.md").read_text()
    assert f"| of the blocks' weights, quantized | {result.share:.2%} |" in card


@pytest.mark.usefixtures("_leave_out_what_others_test")
def test_a_family_that_stays_out_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="writes into its weights") as refusal:
        product.run_family("rwkv", tmp_path, product.Result("rwkv"))
    assert "\n" not in str(refusal.value)


def test_configs_become_small_by_the_meaning_of_their_numbers() -> None:
    config = small.small_config("qwen3_next")
    assert config.num_hidden_layers == len(config.layer_types)
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert config.hidden_size == 64
    assert config.num_experts == 4


def test_the_page_names_every_family_and_every_reason() -> None:
    rows = [
        {"family": "a", "verdict": "whole", "share": 0.99, "silent": [], "reason": ""},
        {"family": "b", "verdict": "refused", "share": 0.0, "silent": [], "reason": "b: no | head"},
    ]
    counts = dict.fromkeys(("families", "whole", "partial", "refused", "tracebacks", "silent", "unmade"), 1)
    text = table.page(rows, counts | {"unreadable_checkpoints": 0, "transformers": "5"})
    assert "| `a` | whole | 99% |" in text
    assert "b: no \\| head" in text
