"""Exported GGUF files, run by llama.cpp itself. Opt-in: `make test-gguf` builds it first, which takes minutes."""

import functools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ggufs import CHATS, OTHERS, as_of_phi3, learnt, other, parts_of, tokenizer_of
from tiny import llama
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from wrinklefree.config.compose import load_config
from wrinklefree.core.method import QuantMethod, find, quant_layers
from wrinklefree.data.open import heldout_batches
from wrinklefree.export.formats import gguf
from wrinklefree.export.proof.agreement import Agreement
from wrinklefree.export.views.levels import Levels
from wrinklefree.generate.open import open_model
from wrinklefree.gguf import tokens
from wrinklefree.gguf.header import read_header
from wrinklefree.models.load import load_model
from wrinklefree.packed.products.choose import exactly
from wrinklefree.runs import launch

pytestmark = pytest.mark.llamacpp

LENGTH, TOKENS = 256, 8192


@contextmanager
def llama_cpp(file: Path) -> Iterator[Any]:
    library = pytest.importorskip("llama_cpp", reason="make test-gguf builds it")
    model = library.Llama(str(file), n_ctx=LENGTH, logits_all=True, verbose=False, n_threads=1)
    yield model
    model.close()


Trained = Callable[[str, str], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """`tiny`, ternary, after 60 steps: agreement is promised of trained models, their guesses are less close calls."""

    @functools.cache
    def train(norm_mode: str, granularity: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        run = tmp_path_factory.mktemp("run") / "out"
        settings = ["model=tiny", "training=stage2_pretrain", "training.start_from=[]", "training.max_steps=60"]
        settings += [f"method.norm_mode={norm_mode}", f"method.granularity={granularity}", "method.group_size=64"]
        settings += [f"output_dir={run}"]
        launch.run_stage([*settings, "training.final_eval_tokens=1024"], force=True)
        return load_model(run, dtype=torch.float32)

    return train


def sequences(tokenizer: PreTrainedTokenizerBase) -> Iterator[torch.Tensor]:
    data = load_config(["model=tiny"]).data
    for batch in heldout_batches(data, tokenizer, batch_size=1, length=LENGTH, max_tokens=TOKENS):
        yield batch["input_ids"][0]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids.unsqueeze(0)).logits[0].float().log_softmax(-1)


def theirs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model.reset()
    model.eval(ids.tolist())
    return torch.from_numpy(np.array(model.scores[: len(ids)])).log_softmax(-1)


@pytest.mark.parametrize(
    ("norm_mode", "granularity", "gguf_type", "architecture"),
    [
        ("subln", "tensor", "tq2_0", "bitnet"),
        ("subln", "row", "tq1_0", "bitnet"),
        ("none", "row", "tq2_0", "llama"),
        ("none", "tensor", "tq1_0", "llama"),
        ("none", "row", "q2_0", "llama"),
        ("none", "group", "auto", "llama"),
    ],
)
def test_llama_cpp_gives_our_perplexity_and_our_likeliest_tokens(
    tmp_path: Path, trained: Trained, norm_mode: str, granularity: str, gguf_type: Any, architecture: str
) -> None:
    model, tokenizer = trained(norm_mode, granularity)
    gguf.write(model, tokenizer, tmp_path, [], gguf_type)
    loss = other_loss = 0.0
    same = []
    with llama_cpp(tmp_path / "model.gguf") as program:
        assert program.metadata["general.architecture"] == architecture
        for ids in sequences(tokenizer):
            ours, other = log_probabilities(model, ids), theirs(program, ids)
            targets = ids[1:, None]
            loss -= ours[:-1].gather(1, targets).sum().item()
            other_loss -= other[:-1].gather(1, targets).sum().item()
            same.append((ours.argmax(-1) == other.argmax(-1)).float())
    assert math.exp(abs(other_loss - loss) / TOKENS) < 1.01
    assert torch.cat(same).mean() > 0.98


def test_llama_cpp_reads_one_bit_weights_as_we_do(tmp_path: Path, trained: Trained, monkeypatch: Any) -> None:
    """Q1_0, from a model whose layers were made signs; both run the same file."""
    model, tokenizer = trained("none", "row")
    layers = {}
    for fqn, layer in quant_layers(model).items():
        signs = torch.where(layer.weight.detach() > 0, 1, -1).to(torch.int8)
        layers[f"{fqn}.weight"] = Levels(signs, layer.encode().tensors["scales"] / 2)
    monkeypatch.setattr(gguf, "levels", lambda model: layers)
    monkeypatch.setattr(gguf, "measured", lambda *args: Agreement(0, 0.0, 0.0, 1.0))
    gguf.write(model, tokenizer, tmp_path, [])
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "cache"))
    ours, _ = open_model(str(tmp_path / "model.gguf"))
    header = read_header(tmp_path / "model.gguf")
    assert header.tensors["blk.0.ffn_down.weight"].kind == "Q1_0"
    ids = next(sequences(tokenizer))
    with llama_cpp(tmp_path / "model.gguf") as program, exactly(ours):
        expected, found = log_probabilities(ours, ids), theirs(program, ids)
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 0.02


def test_llama_cpp_cuts_text_into_our_tokens(tmp_path: Path, trained: Trained) -> None:
    model, tokenizer = trained("subln", "tensor")
    gguf.write(model, tokenizer, tmp_path, [])
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sequences(tokenizer)]
    texts += ["def f(x):\n\treturn 'äöü – 日本語 🙂'  # 12345 6.7e-8\r\n\n\n   x", " leading", "", "don't I'LL we've"]
    with llama_cpp(tmp_path / "model.gguf") as program:
        for text in texts:
            expected = tokenizer(text).input_ids
            assert program.tokenize(text.encode(), add_bos=True, special=False) == expected, text


def test_llama_cpp_takes_the_spaces_behind_tokens_as_of_phi3(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(as_of_phi3())
    method = find("bitdistill")(name="bitdistill", norm_mode="none", activation_bits=None)
    gguf.write(method.prepare(other("phi3", vocab_size=len(tokenizer)), []), tokenizer, tmp_path, [])
    with llama_cpp(tmp_path / "model.gguf") as program:
        for text in (*tokens.probes(tokenizer), *CHATS):
            own = tokenizer(text, add_special_tokens=False).input_ids
            assert program.tokenize(text.encode(), add_bos=False, special=True) == own, text


def test_llama_cpp_joins_no_more_than_a_tokenizer_with_few_merges(tmp_path: Path) -> None:
    """Random texts, of which a tokenizer was learnt that has half of the merges that llama.cpp could take."""
    generator = random.Random(0)
    texts = ["".join(generator.choices("aab ", k=200)) for _ in range(100)]
    tokenizer = tokenizer_of(learnt(texts[:50]))
    method = find("bitdistill")(name="bitdistill", norm_mode="none", activation_bits=None)
    gguf.write(method.prepare(llama(vocab_size=len(tokenizer)), []), tokenizer, tmp_path, [])
    with llama_cpp(tmp_path / "model.gguf") as program:
        for text in texts:
            own = tokenizer(text, add_special_tokens=False).input_ids
            assert program.tokenize(text.encode(), add_bos=False, special=True) == own, text


@pytest.mark.parametrize("name", OTHERS)
def test_llama_cpp_computes_the_same_in_other_architectures(name: str, tmp_path: Path) -> None:
    """Without its positions Llama 3 would differ by 5e-4, Gemma 3 without windows by 0.06 (in transformers)."""
    parts = parts_of()
    end = len(parts["model"]["vocab"])
    # llama.cpp asks every Phi-3 for this token.
    parts["added_tokens"].append(parts["added_tokens"][0] | {"id": end, "content": "<|endoftext|>"})
    tokenizer = tokenizer_of(parts)
    model = other(name, vocab_size=len(tokenizer), **({"sliding_window": 64} if name == "mistral" else {}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data *= 4  # so that tokens matter
    method = find("bitdistill")(name="bitdistill", norm_mode="none", activation_bits=None)
    assert isinstance(method, QuantMethod)
    model = method.prepare(model, [])
    gguf.write(model, tokenizer, tmp_path, [], "tq1_0")
    ids = torch.arange(60) * 37 % 256 + 3
    with llama_cpp(tmp_path / "model.gguf") as program:
        expected, found = log_probabilities(model, ids), theirs(program, ids)
        for text in tokens.probes(tokenizer):
            own = tokenizer(text, add_special_tokens=False).input_ids
            assert program.tokenize(text.encode(), add_bos=False, special=True) == own, text
    assert (expected.exp() * (expected - found)).sum(-1).mean() < 2.5e-4
