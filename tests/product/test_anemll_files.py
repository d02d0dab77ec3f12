"""Checkpoints that the original ANEMLL tools wrote are read as what they are, or refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama, qwen, tokenizer
from torch import Tensor
from toyrun import toy_files

import qat_lora
from qat_lora import files
from wrinklefree.config.compose import load_config
from wrinklefree.core.codes import look_up
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import quant_layers
from wrinklefree.export.formats import anemll
from wrinklefree.methods.anemll import Config
from wrinklefree.models.load import load_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a toy model."""
    toy_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def as_upstream(view: str) -> tuple[Any, dict[str, Tensor]]:
    """A model, and its state dict as the original tools write it: factors, latent weights, or codes and magnitudes."""
    model = Config(view=view, rank=4, attn_rank=2).prepare(llama())
    layers = quant_layers(model)
    written = {n: t for n, t in model.state_dict().items() if n.rpartition(".")[0] not in layers}
    for fqn, layer in layers.items():
        codes = layer.encode()
        a, b = codes.tensors["a"].detach(), codes.tensors["b"].detach()
        written |= {f"{fqn}.lut": codes.tensors["lut"].detach(), f"{fqn}.weight": layer.weight.detach()}
        if view == "v2":
            written |= {f"{fqn}._Q": look_up(codes.tensors["lut"], codes.index).detach()}
            written |= {f"{fqn}._indices": codes.index.long(), f"{fqn}.rank_magnitude": a.norm(dim=0) * b.norm(dim=1)}
            a, b = 3 * a, b / b.norm(dim=1, keepdim=True)  # directions count, lengths do not
        written |= {f"{fqn}.scale_A": a, f"{fqn}.scale_B": torch.nn.functional.pad(b, (0, 5 * (view == "v1")))}
    return model, written


@pytest.mark.parametrize("view", ["v1", "v2"])
@pytest.mark.parametrize("nested", [True, False])
def test_checkpoints_of_the_original_tools_are_read(folder: Path, view: str, nested: bool) -> None:
    model, written = as_upstream(view)
    torch.save({"model_state_dict": written, "step": 3} if nested else written, folder / "theirs.pt")
    opened = files.open_checkpoint(folder / "theirs.pt", "./toy")
    method = opened.config.method
    assert isinstance(method, Config)
    assert (method.view, method.bits, method.rank, method.attn_bits, method.attn_rank) == (view, 2, 4, 4, 2)
    for fqn, layer in quant_layers(opened.model).items():
        expected = quant_layers(model)[fqn]
        assert torch.equal(layer.encode().index, expected.encode().index)
        ours, theirs = layer.decode(layer.encode()), expected.decode(expected.encode())
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def test_what_is_written_for_anemll_is_read_back_exactly(folder: Path) -> None:
    model = Config(rank=4, attn_rank=2).prepare(llama())
    anemll.write(model, tokenizer(), folder / "out", [])
    opened = files.open_checkpoint(folder / "out" / anemll.FILE, "./toy")
    for fqn, layer in quant_layers(opened.model).items():
        expected = quant_layers(model)[fqn]
        assert torch.equal(layer.encode().index, expected.encode().index)
        assert torch.allclose(layer.decode(layer.encode()), expected.decode(expected.encode()), rtol=2e-3, atol=1e-6)


def damaged(written: dict[str, Tensor], how: str) -> Any:
    name = "model.layers.0.mlp.up_proj"
    if how == "no scales":
        return {n: t for n, t in written.items() if "scale" not in n}
    if how == "no table":
        return {n: t for n, t in written.items() if n != f"{name}.lut"}
    if how == "a layer less":
        return {n: t for n, t in written.items() if not n.startswith(f"{name}.")}
    if how == "another rank":
        return written | {f"{name}.scale_A": torch.ones(96, 3), f"{name}.scale_B": torch.ones(3, 64)}
    if how == "shapes":
        return written | {f"{name}.scale_A": torch.ones(95, 4)}
    if how in PARTS:
        part, tensor = PARTS[how]
        return written | {f"{name}.{part}": tensor}
    return [1, 2, 3]


PARTS = {
    "one dimension": ("scale_B", torch.ones(64)),
    "no dimension": ("scale_A", torch.ones(())),
    "magnitudes": ("rank_magnitude", torch.ones(7)),
    "not finite": ("scale_A", torch.full((96, 4), torch.nan)),
    "out of the table": ("_indices", torch.full((96, 64), 9)),
    "an adapter": ("lora_A", torch.ones(8, 64)),
}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no scales", "no tensor named"),
        ("no table", "lacks lut"),
        ("a layer less", "does not fit"),
        ("another rank", "different bits or ranks"),
        ("shapes", "do not fit one another"),
        ("a list", "no tensors by name"),
        ("one dimension", "do not fit one another"),
        ("no dimension", "do not fit one another"),
        ("magnitudes", "do not fit one another"),
        ("not finite", "infinite"),
        ("out of the table", "out of the table"),
        ("an adapter", "merge it"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder: Path, how: str, said: str) -> None:
    torch.save(damaged(as_upstream("v1")[1], how), folder / "theirs.pt")
    with pytest.raises(UserError, match=said):
        files.open_checkpoint(folder / "theirs.pt", "./toy")


UNKNOWN = {
    "a trained table": ("model.layers.0.mlp.up_proj._lut_raw_deltas", "not known, and it may change the weights"),
    "factors as tables": ("model.layers.0.mlp.up_proj.A_lut", "not known, and it may change the weights"),
    "factors as indices": ("model.layers.0.mlp.up_proj._A_idx", "not known, and it may change the weights"),
    "an adapter beside": ("lm_head.lora_A", "a layer with this and without scale_A is not read"),
    "a weight of another model": ("model.layers.0.mlp.gate.weight", "the model has no such weight (1 in all)"),
}


@pytest.mark.parametrize("case", UNKNOWN)
@pytest.mark.parametrize("view", ["v1", "v2"])
def test_a_tensor_that_nobody_reads_is_refused_by_name(folder: Path, case: str, view: str) -> None:
    name, said = UNKNOWN[case]
    _, written = as_upstream(view)
    torch.save(written | {name: torch.zeros(4)}, folder / "theirs.pt")
    with pytest.raises(UserError) as refused:
        files.open_checkpoint(folder / "theirs.pt", "./toy")
    assert name in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_layer_with_full_scales_among_others_is_refused(folder: Path) -> None:
    """It has no scale_A, and was taken for a layer that is not quantized."""
    _, written = as_upstream("v1")
    layer = "model.layers.1.mlp.down_proj"
    written[f"{layer}.full_scales"] = written.pop(f"{layer}.scale_A") @ written.pop(f"{layer}.scale_B")
    torch.save(written, folder / "theirs.pt")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.full_scales: a layer with this and without"):
        files.open_checkpoint(folder / "theirs.pt", "./toy")


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("setting", [{"force_positive_scales": True}, {"magnitude_activation": "softplus"}])
def test_a_setting_that_changes_what_tensors_mean_is_refused(folder: Path, setting: Any, beside: bool) -> None:
    _, written = as_upstream("v2")
    torch.save(written if beside else {"model_state_dict": written, "config": setting}, folder / "theirs.pt")
    if beside:
        (folder / "config.json").write_text(json.dumps(setting))
    with pytest.raises(UserError, match=f"{next(iter(setting))}=.* is not read, only"):
        files.open_checkpoint(folder / "theirs.pt", "./toy")


def test_a_layer_that_was_left_as_it_was_stays_so(folder: Path) -> None:
    """The original V1 trainer leaves attention alone unless it is told not to."""
    model = Config(rank=4, exclude_names=["lm_head", "self_attn"]).prepare(llama())
    qat_lora.snap_model_for_ane_v2(model)
    torch.save(model.state_dict(), folder / "theirs.pt")
    opened = files.open_checkpoint(folder / "theirs.pt", "./toy")
    assert quant_layers(opened.model).keys() == quant_layers(model).keys()
    files.save(opened, folder / "ours")
    assert len(quant_layers(load_model(folder / "ours")[0])) == 6


def test_biases_are_read(folder: Path) -> None:
    model, other = (Config(rank=4, attn_rank=2).prepare(qwen()) for _ in range(2))
    model.model.layers[0].self_attn.q_proj.bias.data += 1
    anemll.write_state(model, folder / "m.pt")
    qat_lora.load_v2_checkpoint(other, folder / "m.pt")
    assert torch.equal(*(m.model.layers[0].self_attn.q_proj.bias for m in (model, other)))


def original(weight: Tensor, size: int, rank: int, view: str) -> tuple[dict[str, Tensor], Tensor]:
    """A layer as the original tools initialize it, and the weight that they compute with, by their formulas."""
    lut = torch.linspace(-1, 1, size, dtype=torch.float16).float()
    maxima = weight.unflatten(1, (-1, 32)).abs().amax(-1).repeat_interleave(32, 1)
    u, s, v = torch.linalg.svd(maxima, full_matrices=False)
    if view == "v1":
        a, b = u[:, :rank] * s[:rank], v[:rank]
        scales = (a @ b).clamp_min(1e-8)
        index = (((weight / scales).clamp(-1, 1) + 1) * (size - 1) / 2).round().long()
        return {"weight": weight, "lut": lut, "scale_A": a, "scale_B": b}, lut[index] * scales
    g = torch.maximum(s[:rank], (0.01 * s[0]).clamp_min(0.01)).half().float()
    scales = (u[:, :rank] * (g + 1e-6)) @ v[:rank]
    index = (weight / scales).clamp(-1, 1).unsqueeze(-1).sub(lut).abs().argmin(-1)
    tensors = {"weight": weight, "lut": lut, "scale_A": 2 * u[:, :rank], "scale_B": 5 * v[:rank], "rank_magnitude": g}
    return tensors | {"_Q": lut[index], "_indices": index}, lut[index] * scales


@pytest.mark.parametrize(
    ("view", "left_out"), [("v1", ()), ("v2", ()), ("v2", ("_indices",)), ("v2", ("_indices", "_Q"))]
)
def test_a_file_is_worth_what_the_original_formulas_say(folder: Path, view: str, left_out: tuple[str, ...]) -> None:
    written, expected = {}, {}
    for name, tensor in llama().state_dict().items():
        fqn = name.rpartition(".")[0]
        if not fqn.endswith("_proj"):
            written[name] = tensor
            continue
        tensors, expected[fqn] = original(tensor, *((4, 2) if "mlp" in fqn else (16, 1)), view)
        written |= {f"{fqn}.{part}": t for part, t in tensors.items() if part not in left_out}
    torch.save(written, folder / "theirs.pt")
    opened = files.open_checkpoint(folder / "theirs.pt", "./toy")
    assert isinstance(opened.config.method, Config)
    assert opened.config.method.view == view
    for fqn, layer in quant_layers(opened.model).items():
        assert (layer.decode(layer.encode()) - expected[fqn]).norm() < 1e-3 * expected[fqn].norm()


def test_a_file_that_would_run_code_is_refused(folder: Path) -> None:
    torch.save({"scale_A": torch.nn.Linear(2, 2)}, folder / "theirs.pt")
    with pytest.raises(UserError, match="read safely") as refused:
        files.open_checkpoint(folder / "theirs.pt", "./toy")
    assert "weights_only" not in str(refused.value)  # torch's advice is how to run it
    (folder / "empty.pt").touch()
    with pytest.raises(UserError, match="read safely"):
        files.open_checkpoint(folder / "empty.pt", "./toy")


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    opened = files.Opened(Config(rank=4).prepare(llama()), tokenizer(), load_config(["model=tiny"]))  # type: ignore[arg-type]
    (folder / "x.pt").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        files.save(opened, folder / "x.pt")
    assert (folder / "x.pt").read_text() == "mine"
