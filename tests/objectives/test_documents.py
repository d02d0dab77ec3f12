"""Rows of several documents: which models keep them apart, and what becomes of the others."""

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import family, llama
from toyrun import CPU, resolved, run, toy_files
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutput

from wrinklefree.core.batch import places
from wrinklefree.core.errors import UserError
from wrinklefree.objectives.documents import check_causal, keeps_apart
from wrinklefree.objectives.language_model import SplitModel
from wrinklefree.runs.setup import choose_rows, open_run

# Families by whether they keep documents apart.
APART: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {}, "phi": {}, "mixtral": {}}
TOGETHER: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 96}, "bloom": {}, "mamba": {"state_size": 16}, "rwkv": {}}


@pytest.mark.parametrize("name", [*APART, *TOGETHER])
def test_models_are_tried_not_known(name: str) -> None:
    assert keeps_apart(family(name, **(APART | TOGETHER)[name])) == (name in APART)


def test_a_model_that_counts_positions_from_another_number_is_not_told_any() -> None:
    """RoBERTa's first position is 2. Told that it is 0, it would be trained on other embeddings."""
    model = family("roberta", is_decoder=True, pad_token_id=1, max_position_embeddings=64)
    assert not keeps_apart(model)


def test_a_model_whose_forward_pass_fails_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    monkeypatch.setattr(model.lm_head, "weight", torch.nn.Parameter(torch.ones(7, 5)))
    with pytest.raises(UserError, match="LlamaForCausalLM: its own forward pass fails on 8 tokens: "):
        check_causal(model)


@pytest.mark.parametrize("name", TOGETHER)
def test_a_row_holds_one_document_if_the_model_sees_all_of_it(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    toy_files(tmp_path, family(name, **TOGETHER[name]))
    with open_run(resolved(tmp_path, "training.max_seq_length=32"), world=CPU) as opened:
        rows = [next(opened.stream()) for _ in range(4)]
        assert opened.config.data.rows == "one_document"
        body = SplitModel(opened.model)
    assert "each row holds one" in caplog.text
    for row in rows:
        assert "position_ids" not in row
        learned = row["labels"] != -100
        starts = (places(row) == 0) & learned.roll(-1, dims=1)
        assert (starts[:, :-1].sum(1) <= 1).all()  # all further starts are padding, which nobody learns
        assert torch.isfinite(body.states(row)).all()


def test_every_token_of_the_text_is_in_some_row(tmp_path: Path) -> None:
    """A document of 41 tokens in rows of 16 is three rows: 16, 16 and 9 tokens."""
    toy_files(tmp_path, family("opt", ffn_dim=96))
    with open_run(resolved(tmp_path), world=CPU) as opened:
        stream = opened.stream()
        rows = torch.cat([next(stream)["labels"] for _ in range(3)])
    assert ((rows[:3] != -100).sum(1).tolist()) == [15, 16, 9]


def test_packed_rows_stay_what_they_were(tmp_path: Path) -> None:
    toy_files(tmp_path)
    with open_run(resolved(tmp_path), world=CPU) as opened:
        assert opened.config.data.rows == "packed"
        assert "position_ids" in next(opened.stream())


@pytest.mark.parametrize("name", ["opt", "mamba"])
def test_such_a_model_trains(name: str, tmp_path: Path) -> None:
    toy_files(tmp_path, family(name, **TOGETHER[name]))
    run(resolved(tmp_path, "training.max_steps=2"))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_model_without_a_number_of_positions_has_a_length(tmp_path: Path) -> None:
    model = family("mamba", state_size=16)
    del model.config.max_position_embeddings
    toy_files(tmp_path, model)
    with open_run(resolved(tmp_path, "training.max_seq_length=auto"), world=CPU) as opened:
        assert opened.plan.length == 2048


def test_an_encoder_is_no_causal_model() -> None:
    check_causal(family("bert", is_decoder=True))
    with pytest.raises(UserError, match="BertLMHeadModel: its tokens see those after them"):
        check_causal(family("bert"))


class Unplaced(LlamaModel):
    """A body that cannot be told positions, as models with code of their own may be."""

    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, use_cache=use_cache)


class UnplacedForCausalLM(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Unplaced(config)

    def forward(self, input_ids: Any = None, use_cache: Any = None) -> Any:
        states = self.model(input_ids=input_ids, use_cache=use_cache).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states))


def test_a_model_that_takes_no_positions_keeps_nothing_apart(tmp_path: Path) -> None:
    model = UnplacedForCausalLM(llama().config).eval()
    assert not keeps_apart(model)
    toy_files(tmp_path)
    with pytest.raises(UserError, match="UnplacedForCausalLM takes no positions: leave both out"):
        choose_rows(resolved(tmp_path, "data.rows=packed"), model)


def test_random_numbers_without_a_seed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    forward, chance = model.forward, random.SystemRandom()
    monkeypatch.setattr(model, "forward", lambda **inputs: noisy(forward(**inputs), chance.random()))
    with pytest.raises(UserError, match="random numbers that have no seed"):
        check_causal(model)


def noisy(output: Any, noise: float) -> Any:
    output.logits = output.logits + noise
    return output


def test_a_model_that_fails_once_it_keeps_what_it_has_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    forward = model.forward

    def fails(use_cache: bool = True, **inputs: Any) -> Any:
        if use_cache:
            raise AttributeError("it has no cache")
        return forward(use_cache=use_cache, **inputs)

    monkeypatch.setattr(model, "forward", fails)
    with pytest.raises(UserError, match="its own forward pass fails on 8 tokens: AttributeError it has no cache"):
        check_causal(model)
