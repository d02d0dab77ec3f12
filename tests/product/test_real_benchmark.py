"""The benchmark on a real model: its measure, its bytes, and the formulas of the peers, on tiny random models."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, llama, tokenizer
from torch import Tensor
from toyrun import overrides, toy_files
from transformers import PreTrainedModel

from benchmarks.real import __main__ as table
from benchmarks.real import measure, ours, peers, picture
from benchmarks.real.llama import Runner, bits_per_block_weight
from benchmarks.real.rows import Row, Store
from wrinklefree.compare import formulas
from wrinklefree.compare.others.with_llama_cpp import importance, quantize, write
from wrinklefree.compare.references import file_bytes
from wrinklefree.config.compose import load_config
from wrinklefree.core.errors import UserError
from wrinklefree.export.rounded import head
from wrinklefree.gguf.header import read_header
from wrinklefree.gguf.values import read_weight
from wrinklefree.models.load import load_model
from wrinklefree.runs.stage import train_stage

torch.set_num_threads(1)


def texts(count: int, length: int = 16) -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (length,), generator=random) for _ in range(count)]


def small_test() -> measure.Test:
    return measure.Test(texts(3), texts(2), measure.of_model(llama()), tokenizer())


def row(name: str, ppl: float, size: int) -> Row:
    return Row(name, bits=2.0, bytes=size, ppl=ppl, kl=0.0, top1=1.0, minutes=5.0, sample={}, source="here")


# The measure


def test_perplexity_is_that_of_transformers_loss() -> None:
    model = llama()
    losses = [model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.item() for ids in texts(3)]
    expected = math.exp(sum(losses) / len(losses))
    assert measure.perplexity(measure.of_model(model), texts(3)) == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    assert measure.perplexity(lambda ids: torch.zeros(len(ids), VOCAB), texts(2)) == pytest.approx(VOCAB)


def test_the_distance_of_a_model_to_itself_is_zero_and_else_the_mean_kl() -> None:
    original = measure.of_model(llama())
    assert measure.distance(original, original, texts(2)) == (pytest.approx(0, abs=1e-6), 1.0)
    kl, top1 = measure.distance(lambda ids: torch.zeros(len(ids), VOCAB), original, texts(2))
    p = torch.cat([original(ids)[:-1] for ids in texts(2)]).softmax(-1)
    assert kl == pytest.approx((math.log(VOCAB) + (p * p.log()).sum(-1)).mean().item(), rel=1e-4)
    assert top1 < 0.2


def test_the_test_is_the_first_tokens_and_calibration_is_from_the_rest() -> None:
    windows, rest = measure.split(torch.arange(1000), tokens=64, window=16)
    assert torch.equal(torch.cat(windows), torch.arange(64))
    assert len(windows) == 4
    assert measure.calibration(rest, rows=9, length=100).min() == 64
    with pytest.raises(UserError, match="to calibrate on"):
        measure.calibration(rest, rows=10, length=100)
    with pytest.raises(UserError, match="the test alone needs"):
        measure.split(torch.arange(100), tokens=64)


def test_documents_give_exactly_the_wanted_predictions(tmp_path: Path) -> None:
    file = tmp_path / "self.jsonl"
    file.write_text("".join(json.dumps({"text": "w1 w2 w3 " * n}) + "\n" for n in (3, 10, 6)), encoding="utf-8")
    found = measure.documents(file, tokenizer(), tokens=40, window=25)
    assert sum(len(ids) - 1 for ids in found) == 40
    assert max(len(ids) for ids in found) == 25
    with pytest.raises(UserError, match="are needed"):
        measure.documents(file, tokenizer(), tokens=400)
    chat = tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "w1 w2"}] * 3}), encoding="utf-8")
    assert measure.documents(file, chat, tokens=5)[0].tolist() == [1, 2, 1, 2, 1, 2]


def test_what_the_original_writes_is_the_same_for_the_same_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "WINDOW", 24)
    model, files = llama(bos_token_id=1, eos_token_id=2), [tmp_path / "a", tmp_path / "b"]
    for file in files:
        measure.write_documents(model, tokenizer(), file, tokens=400)
    assert files[0].read_text() == files[1].read_text()
    assert all(json.loads(line)["text"] for line in files[0].read_text().splitlines())


def test_greedy_text_is_that_of_generate() -> None:
    model, words = llama(max_position_embeddings=128), tokenizer()
    ids = words("w5 w6", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=measure.SAMPLE_TOKENS, do_sample=False, eos_token_id=None)
    text = measure.continued(measure.of_model(model), words, "w5 w6", temperature=0.0)
    assert text == words.decode(expected[0, ids.shape[1] :])


# Bytes


def whole_bytes(model: PreTrainedModel, bits: float) -> int:
    linears = measure.block_linears(model)
    return file_bytes(model, linears, bits * sum(linear.weight.numel() for linear in linears.values()))


def test_whole_bytes_are_those_of_the_parts() -> None:
    model = llama()
    blocks = sum(linear.weight.numel() for linear in measure.block_linears(model).values())
    norms = 5 * 64
    assert whole_bytes(model, 2.25) == blocks * 2.25 / 8 + VOCAB * (64 + 2) + 2 * norms


def test_an_untied_head_is_counted_too() -> None:
    tied, untied = llama(), llama(tie_word_embeddings=False)
    assert whole_bytes(untied, 2) - whole_bytes(tied, 2) == VOCAB * (64 + 2)


# The formulas


def test_rtn_has_four_levels_a_group_and_errs_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    rounded = formulas.rtn(weight, 64)
    for before, after in zip(weight.reshape(-1, 64), rounded.reshape(-1, 64), strict=True):
        step = (before.max() - before.min()) / 3
        assert len(after.unique()) <= 4
        assert (before - after).abs().max() <= step * 1.01  # half a step for the code, half for the integer zero


def test_rtn_keeps_weights_that_are_on_its_grid() -> None:
    weight = torch.tensor([-0.5, 0.0, 0.5, 1.0]).repeat(2, 16)
    assert torch.equal(formulas.rtn(weight, 64), weight)


def test_hqq_lowers_the_error_of_its_start() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 128)
    errors = {q: (q(weight, 64) - weight).abs().mean().item() for q in (formulas.rtn, formulas.hqq)}
    assert errors[formulas.hqq] < errors[formulas.rtn]
    assert all(len(group.unique()) <= 4 for group in formulas.hqq(weight, 64).reshape(-1, 64))


def test_hqq_zero_is_the_mean_that_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formulas, "STEPS", 1)
    torch.manual_seed(0)
    w = torch.randn(4, 64)
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = (high - low) / 3
    q = (w / scale - low / scale).round().clamp(0, 3)
    error = w - low - scale * q
    shrunk = error.sign() * (error.abs() - error.abs() ** -0.3 / 10).clamp_min(0)
    zero = (q - (w - shrunk) / scale).mean(1, keepdim=True)
    expected = scale * ((w / scale + zero).round().clamp(0, 3) - zero)
    assert torch.allclose(formulas.hqq(w, 64), expected, atol=2e-3)


@pytest.mark.parametrize("name", ours.COMMANDS)
def test_settings_of_every_run_compose(name: str) -> None:
    command = ours.command(name, Path("tiny"), Path("text"), Path("out"), "--budget 2h", seed=3)
    settings = [word for word in command if "=" in word]
    if command[0] == "fairy2":
        settings = [f"training=fairy2_{command[command.index('--mode') + 1]}", f"model={command[2]}", *settings]
    config = load_config(settings)
    assert command[-2:] == ["--budget", "2h"]
    assert config.method is not None
    assert config.seed == 3
    assert config.export.head_bits == 8
    assert list(config.training.start_from) == []


# Peers and the table


def test_a_dense_peer_replaces_block_weights_and_rounds_the_embedding(tmp_path: Path) -> None:
    model = llama(max_position_embeddings=128)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    setup = peers.Setup(tmp_path, model, small_test(), torch.stack(texts(2)), tmp_path, tmp_path, 1, tmp_path)
    same = peers.original_int8_embedding(setup, "same")
    zero = peers.dense_row(setup, "zero", lambda _, weight: weight * 0, 2.0, "zeros")
    with head.rounded(model, head.quantize(model, 8)):
        assert same.ppl == measure.perplexity(measure.of_model(model), setup.test.windows)
    assert zero.kl > same.kl
    assert zero.bytes == whole_bytes(model, 2.0)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_importance_is_the_mean_square_of_inputs() -> None:
    model, rows = llama(), torch.stack(texts(3))
    found = importance(model, measure.block_linears(model), rows)
    assert len(found) == len(measure.block_linears(model))
    layer = model.model.layers[0]
    inputs = layer.input_layernorm(model.model.embed_tokens(rows))
    assert torch.allclose(found["blk.0.attn_q.weight"], inputs.square().mean((0, 1)), rtol=1e-4)


def test_a_file_for_llama_cpp_has_the_models_weights(tmp_path: Path) -> None:
    model = llama(num_key_value_heads=2)
    write(model, tmp_path / "plain.gguf")
    header = read_header(tmp_path / "plain.gguf")
    weight = read_weight(header, "model.layers.1.self_attn.q_proj.weight", model.config.num_attention_heads)
    assert torch.equal(weight, model.model.layers[1].self_attn.q_proj.weight.half().float())
    assert len(header.tensors) == len(model.state_dict()) - int(model.config.tie_word_embeddings)


def test_rows_come_back_and_are_measured_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(row("w2", 30.0, 50))
    again = Store(tmp_path)
    assert again.rows == store.rows
    assert not table.wanted(again, "w2", "", "here")
    assert table.wanted(again, "w2", "", "another folder")
    assert table.wanted(again, "w2", "rtn,w2")
    assert table.wanted(again, "rtn", "")


def test_figures_compare_seeds_with_peers_of_no_more_bytes() -> None:
    rows = [row("original", 20.0, 99), row("w2", 30.0, 50), row("w2.2", 34.0, 50), row("ternary", 40.0, 50)]
    rows += [row("rtn", 64.0, 60), row("seq", 48.0, 50), row("residual_signs", 80.0, 50)]
    figures = table.summary({each.name: each for each in rows}, Path("missing.json"))
    assert figures["w2_ppl_ratio"] == pytest.approx(1.6)
    assert figures["ternary_ppl_ratio"] == pytest.approx(2.0)
    assert figures["w1_ppl_ratio"] is None
    assert figures["best_peer_over_w2"] == pytest.approx(1.5)  # rtn has more bytes
    assert figures["peer_over_w2"] == pytest.approx({"rtn": 2.0, "seq": 1.5, "residual_signs": 2.5})


def test_runs_of_one_name_are_seeds() -> None:
    found = table.given(["w2=a", "w2=b", "w1=c", "w2=d"])
    assert found == {"w2": Path("a"), "w2.2": Path("b"), "w1": Path("c"), "w2.3": Path("d")}
    with pytest.raises(UserError, match="NAME=FOLDER"):
        table.given(["w2"])
    assert [table.name_and_seed(name) for name in ("w2", "w2.3")] == [("w2", 0), ("w2", 2)]
    with pytest.raises(UserError, match="--train w3"):
        table.name_and_seed("w3")


@pytest.mark.slow
def test_a_finished_run_is_measured_as_packed(tmp_path: Path) -> None:
    toy_files(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        ours.row("w2", tmp_path / "run", small_test())
    train_stage(load_config(overrides(tmp_path, "training=seq_w2", "export.head_bits=8")), force=False)
    found = ours.row("w2", tmp_path / "run", small_test())
    packed, _ = load_model(tmp_path / "run" / "packed", dtype=torch.float32)
    assert found.ppl == measure.perplexity(measure.of_model(packed), small_test().windows)
    assert found.bytes == (tmp_path / "run" / "packed" / "model.safetensors").stat().st_size
    assert 2 < found.bits < 3
    assert found.minutes > 0
    train_stage(load_config(overrides(tmp_path)), force=True)
    with pytest.raises(UserError, match=r"train with export\.head_bits=8"):
        ours.row("w2", tmp_path / "run", small_test())


@pytest.mark.llamacpp
def test_llama_cpp_computes_the_logits_of_the_file_that_was_written(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="make test-gguf builds it")
    model, ids = llama(), texts(1)[0]
    write(model, tmp_path / "f16.gguf")
    runner = Runner(Path(sys.executable), tmp_path / "f16.gguf", VOCAB)
    kl, top1 = measure.distance(runner, measure.of_model(model), [ids, ids])
    runner.close()
    assert kl < 1e-4
    assert top1 == 1.0


@pytest.mark.llamacpp
def test_llama_cpp_quantizes_with_an_importance_matrix(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="make test-gguf builds it")
    model = llama(hidden_size=256, intermediate_size=256)
    write(model, tmp_path / "f16.gguf")
    matrix = importance(model, measure.block_linears(model), torch.stack(texts(2)))
    quantize(Path(sys.executable), tmp_path / "f16.gguf", tmp_path / "IQ2_XS.gguf", "IQ2_XS", matrix)
    assert bits_per_block_weight(tmp_path / "IQ2_XS.gguf") < 3  # refused without the matrix


def test_kept_rows_are_shown_without_a_model_and_name_no_place() -> None:
    found = table.figures(table.arguments().parse_args(["--json"]))
    assert found["rows"]["original"]["ppl"] > 1
    for name, row in Store(table.KEPT).rows.items():
        assert not row.source.startswith("/"), name
        assert row.commit, name


def test_the_picture_is_that_of_the_kept_rows(tmp_path: Path) -> None:
    """If this fails: python -m benchmarks.real --picture docs/quality.svg."""
    rows = Store(table.KEPT).rows
    assert set(picture.NAMES) <= set(rows)
    picture.write(rows, tmp_path / "quality.svg")
    assert (tmp_path / "quality.svg").read_bytes() == (table.HERE.parents[1] / "docs" / "quality.svg").read_bytes()
