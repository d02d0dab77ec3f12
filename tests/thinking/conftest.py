"""What several files of tests read, made once."""

from pathlib import Path

import pytest
import torch
from thinkers import TOKENIZER, compressor, resolved, thinking_model

from wrinklefree.models.load import load_model
from wrinklefree.thinking import loading, pairs_stage
from wrinklefree.thinking.hidden_pairs import HiddenPairs
from wrinklefree.thinking.network import LatentThinker
from wrinklefree.thinking.speech import Speaker


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a thinking model, a compressor and hidden pairs, all of an experiment named `toy`."""
    folder = tmp_path_factory.mktemp("thinking")
    model = thinking_model()
    model.save_pretrained(folder / "lm")
    TOKENIZER.save_pretrained(folder / "lm")
    compressor(folder, model)
    pairs_stage.make_pairs(resolved(folder, "trm_pairs"), force=False)
    return folder


@pytest.fixture(scope="session")
def speaker(toy: Path) -> Speaker:
    model, tokenizer = load_model(toy / "lm", dtype=torch.float32)
    return Speaker(model.requires_grad_(False), tokenizer)


@pytest.fixture
def thinker(toy: Path) -> LatentThinker:
    """With the toy's compressor, a random network and a random adapter."""
    torch.manual_seed(0)
    before, _ = loading.load_thinker(toy / "toy_trm_compressor")
    return before.eval()


@pytest.fixture(scope="session")
def train(toy: Path) -> HiddenPairs:
    return HiddenPairs(toy / "toy_trm_pairs", "train")
