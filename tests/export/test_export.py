"""The packed folder: true sizes, a proof that can fail, a loader that needs no package, and nothing half-written."""

import ast
import copy
import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, batches, family, ids, llama, qwen, shipped_methods, tokenizer, toy, with_toy_method
from torch import nn
from transformers import PreTrainedModel

from wrinklefree.core.errors import UserError
from wrinklefree.core.method import QuantMethod, find, quant_layers
from wrinklefree.export import bundle
from wrinklefree.export.formats.packed import PackedReport, export_packed
from wrinklefree.export.proof import certify
from wrinklefree.export.proof.certify import CertificateError
from wrinklefree.models.load import load_model
from wrinklefree.packed.layer import PackedEmbedding, TiedEmbedding
from wrinklefree.packed.pack import packed_layers

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _method() -> Iterator[None]:
    with with_toy_method():
        yield


def export(trained: PreTrainedModel, out: Path, force: bool = False, **options: Any) -> PackedReport:
    method = next(iter(quant_layers(trained).values())).config
    return export_packed(trained, tokenizer(), method, out, card="# Card", force=force, batches=batches(), **options)


def test_the_folder_is_complete_and_its_card_states_the_figures(tmp_path: Path) -> None:
    report = export(toy().prepare(llama()), tmp_path / "packed")
    names = {path.name for path in (tmp_path / "packed").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "wrinklefree"
    assert config["architectures"] == ["LlamaForCausalLM"]
    card = (tmp_path / "packed" / "README.md").read_text()
    assert card.startswith("# Card")
    assert f"{report.bits_per_weight:.4f}" in card
    assert f"{report.certificate.kl_mean:.1e}" in card


def test_sizes_are_those_on_the_disk(tmp_path: Path) -> None:
    trained = toy().prepare(llama())
    weights = sum(layer.weight.numel() for layer in quant_layers(trained).values())
    report = export(trained, tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    scales = sum(layer.out_features + 4 for layer in quant_layers(trained).values())
    assert report.num_quantized == weights
    assert report.num_parameters == llama().num_parameters()
    assert report.file_bytes == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert report.linear_bytes == sum(t.nbytes for name, t in tensors.items() if "proj" in name)
    assert report.bits_per_quantized_weight == 2 + 16 * scales / weights  # two bits and fp16 scales, nothing else


def test_dense_weights_are_bf16_and_tied_ones_stored_once(tmp_path: Path) -> None:
    trained = toy().prepare(llama())
    export(trained, tmp_path / "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert torch.equal(tensors["model.embed_tokens.weight"], trained.model.embed_tokens.weight.bfloat16())
    assert tensors["model.norm.weight"].dtype == torch.bfloat16


def test_certificate_is_exact_and_counts_the_rounding_of_dense_weights(tmp_path: Path) -> None:
    certificate = export(toy().prepare(qwen()), tmp_path / "packed").certificate
    assert (certificate.layers, certificate.tokens) == (7, ids().numel())
    assert certificate.max_weight_difference == 0
    assert certificate.max_logit_difference <= 1e-6
    assert 0 < certificate.kl_mean <= certificate.kl_max < 1e-3
    exact = export(toy().prepare(qwen()), tmp_path / "exact", dense_dtype="float32").certificate
    assert exact.kl_max < 1e-12


def test_a_quantized_head_is_packed_and_no_longer_tied(tmp_path: Path) -> None:
    trained = toy(exclude_names=["embed_tokens"]).prepare(llama())
    assert export(trained, tmp_path / "packed").certificate.layers == 15
    assert not load_model(tmp_path / "packed")[0].config.tie_word_embeddings


def damage(name: str, model: PreTrainedModel) -> None:
    layer = quant_layers(model)["model.layers.0.mlp.up_proj"]
    with torch.no_grad():
        if name == "one code":
            layer.weight[0, 0] = -10 * layer.weight[0, 0].sign()
        elif name == "one scale":
            layer.scales[3] *= 2
        elif name == "a norm":
            model.model.norm.weight[7] *= 1.01
        else:
            model.model.embed_tokens.weight[3, 5] += 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one code", "codes or scales differ in model.layers.0.mlp.up_proj"),
        ("one scale", "codes or scales differ in model.layers.0.mlp.up_proj"),
        ("a norm", r"model\.norm\.weight: not as trained \(1 such"),
        ("an embedding", r"lm_head\.weight: not as trained \(2 such"),
    ],
)
def test_certify_refuses_a_model_that_is_not_the_trained_one(name: str, message: str, tmp_path: Path) -> None:
    trained = toy().prepare(llama(initializer_range=0.2))
    export(trained, tmp_path / "packed")
    packed = load_model(tmp_path / "packed", dtype=torch.float32)[0]
    certify.certify(trained, packed, batches())
    damage(name, trained)
    with pytest.raises(CertificateError, match=message):
        certify.certify(trained, packed, batches())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [llama, qwen], ids=["tied", "untied"])
def test_embedding_and_head_are_packed_and_what_that_costs_is_said(make, bits: int, tmp_path: Path) -> None:
    trained = toy().prepare(make())
    before = copy.deepcopy(trained.state_dict())
    plain = export(trained, tmp_path / "plain", dense_dtype="float32")
    report = export(trained, tmp_path / "packed", dense_dtype="float32", head_bits=bits)
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert report.certificate.max_logit_difference < 1e-5  # against the trained model, rounded likewise
    assert report.rounding is not None
    assert 0 < report.rounding.kl_mean < (1e-5 if bits == 8 else 5e-3)
    assert (report.num_parameters, report.linear_bytes) == (plain.num_parameters, plain.linear_bytes)
    assert report.file_bytes < plain.file_bytes
    assert f"integers of {bits} bits" in (tmp_path / "packed" / "README.md").read_text()
    packed, _ = load_model(tmp_path / "packed", dtype=torch.float32)
    assert isinstance(packed.get_input_embeddings(), TiedEmbedding if make is llama else PackedEmbedding)
    stored = {name.rpartition(".")[0] for name in packed.state_dict()}
    assert ("model.embed_tokens" in stored) == (make is qwen)
    assert torch.equal(copy.deepcopy(packed)(ids()).logits, packed(ids()).logits)
    table = packed.lm_head.effective_weight(torch.float32) if make is llama else None
    assert table is None or torch.equal(packed.get_input_embeddings()(ids()), table[ids()])
    assert load_model(tmp_path / "packed", dtype=torch.bfloat16)[0](ids()).logits.dtype == torch.bfloat16


def test_scales_are_packed_on_the_kernels_grid_and_codes_stay(tmp_path: Path) -> None:
    """Fairy2i's; the trained model is left as it was, and what moving them costs is in the card."""
    trained = find("fairy2")(name="fairy2").prepare(llama())
    before = copy.deepcopy(trained.state_dict())
    report = export(trained, tmp_path / "packed", dense_dtype="float32")
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert report.certificate.max_logit_difference < 1e-5
    assert report.rounding is not None
    assert 0 < report.rounding.kl_mean < 1e-3
    assert "on the grid of the fast kernels" in (tmp_path / "packed" / "README.md").read_text()
    packed = packed_layers(load_model(tmp_path / "packed", dtype=torch.float32)[0])
    for fqn, layer in quant_layers(trained).items():
        codes, stored = layer.encode(), packed[fqn].codes()
        assert torch.equal(codes.index, stored.index)
        moved = (stored.tensors["scales"] / codes.tensors["scales"] - 1).abs()
        assert 0 < moved.max() < 0.05
    plain = export(trained, tmp_path / "plain", dense_dtype="float32", snap_scales=False)
    assert plain.rounding is None


def test_a_head_that_is_quantized_already_is_not_packed_again(tmp_path: Path) -> None:
    method = dataclasses.replace(toy(), exclude_names=["embed_tokens"])
    with pytest.raises(UserError, match="head_bits=8: the embedding or the head of"):
        export(method.prepare(qwen()), tmp_path / "packed", head_bits=8)
    assert not (tmp_path / "packed").exists()


def test_certify_refuses_logits_that_differ_at_equal_rounding(tmp_path: Path) -> None:
    trained = toy().prepare(llama())
    export(trained, tmp_path / "packed")
    packed = load_model(tmp_path / "packed", dtype=torch.float32)[0]
    packed.model.layers[0].mlp.act_fn = nn.ReLU()
    with pytest.raises(CertificateError, match="at equal rounding"):
        certify.certify(trained, packed, batches())


def noise() -> PreTrainedModel:
    """A model whose logits any rounding moves far: large weights, one norm that is no power of two, sharp attention."""
    model = toy().prepare(llama(initializer_range=1.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


def test_a_model_that_is_noise_is_packed_and_told_what_rounding_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The guide's smoke test: after one step, rounding norms and embeddings to bf16 moves logits past any bound."""
    report = export(noise(), tmp_path / "packed")
    assert report.certificate.kl_mean > certify.LARGE_KL
    assert report.certificate.max_logit_difference <= certify.LOGITS
    assert "--dense-dtype float32 stores them as they are" in caplog.text
    assert f"{report.certificate.kl_mean:.1e}" in (tmp_path / "packed" / "README.md").read_text()
    caplog.clear()
    assert export(noise(), tmp_path / "exact", dense_dtype="float32").certificate.kl_mean < 1e-6
    assert not caplog.text


def test_a_failed_proof_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "LOGITS", -1.0)
    with pytest.raises(CertificateError):
        export(toy().prepare(llama()), tmp_path / "packed")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_needs_force(tmp_path: Path) -> None:
    trained, out = toy().prepare(llama()), tmp_path / "packed"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="--force"):
        export(trained, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    export(trained, out, force=True)
    assert not (out / "mine.txt").exists()
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["file", "safetensors"],
)
def test_a_full_disk_leaves_the_old_folder_and_no_half_one(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, out = toy().prepare(llama()), tmp_path / "packed"
    export(trained, out)
    before = (out / "model.safetensors").read_bytes()

    def full(folder: Path, *args: object) -> None:
        (folder / "half.txt").write_text("half")
        raise error

    monkeypatch.setattr(bundle, "write_loader", full)
    with pytest.raises(UserError, match="disk full"):
        export(trained, out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert (out / "model.safetensors").read_bytes() == before


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to pack"):
        export_packed(llama(), tokenizer(), toy(), tmp_path / "packed", card="", force=False, batches=batches())


def test_a_weight_that_the_format_has_no_place_for_is_named(tmp_path: Path) -> None:
    trained = toy().prepare(llama())
    trained.model.layers[0].extra = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"model\.layers\.0\.extra"):
        export(trained, tmp_path / "packed")


def test_a_model_whose_code_is_not_in_transformers_is_refused(tmp_path: Path) -> None:
    trained = toy().prepare(llama())
    trained.__class__ = type("Mine", (type(trained),), {"__module__": "elsewhere"})
    with pytest.raises(UserError, match="not part of transformers"):
        export(trained, tmp_path / "packed")


WITHOUT_PACKAGE = """
import sys
sys.modules["wrinklefree"] = sys.modules["pydantic"] = None  # importing them fails
import torch
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
folder, again, out, *others = sys.argv[1:]
ids = torch.load(out, weights_only=True)
try:
    AutoModelForCausalLM.from_pretrained(folder)
    raise SystemExit("a random model was loaded in silence")
except RuntimeError as error:
    assert "mismatched" in str(error)
options = {"trust_remote_code": True, "dtype": torch.float32}
model = AutoModelForCausalLM.from_pretrained(folder, **options)
for other in others:  # another model class, other methods, in the same process
    other_model = AutoModelForCausalLM.from_pretrained(other, **options)
    torch.save(other_model(ids).logits, f"{other}/logits.pt")
model.save_pretrained(again)
twice = AutoModelForCausalLM.from_pretrained(again, **options)
assert torch.equal(model(ids).logits, twice(ids).logits)
assert "wrinklefree" not in AUTO_QUANTIZER_MAPPING
torch.save(model.eval()(ids).logits, out)
"""


def test_the_folder_loads_without_the_package_and_is_refused_without_its_loader(tmp_path: Path) -> None:
    """Plain loading stops on the shapes, trust_remote_code=True works, saving again takes the loader along."""
    trained = toy().prepare(llama())
    export(trained, tmp_path / "packed", dense_dtype="float32")
    others = {method.name: method.prepare(qwen()) for method in shipped_methods()}
    for name, other in others.items():
        export(other, tmp_path / name, dense_dtype="float32", snap_scales=False)
    others |= {name: find("fairy2")(name="fairy2").prepare(family(name)) for name in FAMILIES}
    for name in FAMILIES:
        export(others[name], tmp_path / name, dense_dtype="float32", snap_scales=False)
    others |= {"tied": toy().prepare(llama()), "untied": next(iter(shipped_methods())).prepare(qwen())}
    for name in ("tied", "untied"):
        export(others[name], tmp_path / name, dense_dtype="float32", head_bits=8)
    torch.save(ids(), tmp_path / "io.pt")
    arguments = [str(tmp_path / name) for name in ("packed", "again", "io.pt", *others)]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *arguments], env=environment, check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "io.pt"), trained(ids()).logits)
    for name, other in others.items():
        found = torch.load(tmp_path / name / "logits.pt")
        if name in ("tied", "untied"):
            torch.testing.assert_close(found, other(ids()).logits, atol=0.02, rtol=0)
        else:
            assert torch.equal(found, other(ids()).logits)


def test_an_export_proves_its_loader(tmp_path: Path, loader_proofs: object) -> None:
    """GPT-NeoX: transformers renames its head in files, but not for classes that come with a folder."""
    export(find("fairy2")(name="fairy2").prepare(family("gpt_neox")), tmp_path / "packed")


@pytest.mark.slow
def test_a_folder_whose_loader_does_not_give_the_model_is_refused(
    tmp_path: Path, loader_proofs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, write = toy().prepare(llama()), bundle.write_loader
    with monkeypatch.context() as patch:

        def broken(folder: Path, *args: Any) -> None:
            write(folder, *args)
            entry = folder / f"{bundle.ENTRY}.py"
            entry.write_text(entry.read_text() + "\nimport wrinklefree\n")

        patch.setattr(bundle, "write_loader", broken)
        with pytest.raises(CertificateError, match="cannot be loaded without this package: ModuleNotFoundError"):
            export(trained, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    monkeypatch.setattr("wrinklefree.export.proof.loader.prove", lambda *args: None)
    export(trained, tmp_path / "packed")
    expected = load_model(tmp_path / "packed", dtype=torch.float32)[0](ids()[:1]).logits
    with pytest.raises(CertificateError, match=r"logits differ by 5\.0e-01"):
        loader_proofs(tmp_path / "packed", ids()[:1], 2 * expected)
    weights = load_file(tmp_path / "packed" / "model.safetensors")
    weights["elsewhere.weight"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "packed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CertificateError, match=r"elsewhere\.weight: not read from the folder \(2 such"):
        loader_proofs(tmp_path / "packed", ids()[:1], expected)


def test_remote_code_beside_the_package_keeps_the_package_registered(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    export(toy().prepare(llama()), tmp_path / "packed")
    before = AUTO_QUANTIZER_MAPPING["wrinklefree"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", trust_remote_code=True)
    assert torch.equal(model(ids()).logits, load_model(tmp_path / "packed")[0](ids()).logits)
    assert AUTO_QUANTIZER_MAPPING["wrinklefree"] is before


@pytest.mark.parametrize("method", shipped_methods(), ids=lambda method: method.name)
def test_every_method_fits_in_the_folders_loader(method: QuantMethod) -> None:
    """Its copies import each other, torch, transformers, typing_extensions and the standard library, nothing else."""
    files = bundle.files([method], "LlamaForCausalLM")
    known = set(sys.stdlib_module_names) | {"torch", "transformers", "typing_extensions"}
    for file, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= known, file
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] in known, f"{file}: {node.module}"
            elif isinstance(node, ast.ImportFrom) and node.module:
                assert f"{node.module}.py" in files, file


WITH_PARTS = [m for m in shipped_methods() if bundle.part_of(type(m).__module__).endswith(".decode")]


def test_all_methods_that_we_ship_have_a_part_that_reads() -> None:
    assert {"fairy2", "anemll", "bitdistill", "uniform"} <= {method.name for method in WITH_PARTS}


@pytest.mark.parametrize("head", [[], [find("uniform")(name="uniform")]], ids=["plain", "packed head"])
@pytest.mark.parametrize("method", WITH_PARTS, ids=lambda method: method.name)
def test_a_loader_is_few_files_that_a_person_can_read(method: QuantMethod, head: list[QuantMethod]) -> None:
    files = bundle.files([method, *head], "LlamaForCausalLM")
    assert len(files) <= 7
    assert sum(len(text.splitlines()) for text in files.values()) <= 580
