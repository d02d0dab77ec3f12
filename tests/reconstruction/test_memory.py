"""A run that only rebuilds blocks leaves its models in files: the same bits, and memory for one block."""

import bisect
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import llama
from torch import Tensor
from toyrun import overrides, toy_files
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import ModelConfig
from wrinklefree.core import stored
from wrinklefree.core.errors import UserError
from wrinklefree.core.surgery import decoder_layers
from wrinklefree.export.formats import packed
from wrinklefree.export.proof import loader
from wrinklefree.models.load import load_pretrained, load_stored
from wrinklefree.reconstruction.rebuild import Rebuilding
from wrinklefree.runs import memory, preflight
from wrinklefree.runs.report import RESULTS, read_figures
from wrinklefree.runs.setup import Run
from wrinklefree.runs.stage import train_stage

pytestmark = pytest.mark.numeric

ALONE = ("training=blockwise", "training.max_steps=0", "training.start=auto", "training.blockwise.enabled=true")


def settings(folder: Path, *more: str) -> list[str]:
    return overrides(folder, *ALONE, "training.blockwise.steps=3", "training.blockwise.batch_size=16", *more)


def in_bf16(folder: Path, model: PreTrainedModel) -> None:
    toy_files(folder, model.to(torch.bfloat16))


METHODS = {
    "paper": ["method=fairy2", "method.preset=paper"],
    "BitNet": ["method=bitdistill"],
    "ternary": ["method=bitdistill", "method.scale_mode=learned", "method.norm_mode=none"],
    "norms inside": ["method=bitdistill", "method.norm_mode=per_linear"],
    "anemll": ["method=anemll", "method.rank=2", "method.attn_rank=2"],
    "head": ["method=uniform", "method.exclude_names=[]"],
    "rotated": ["method=fairy2", "method.rotate_inputs=true"],
    "bf16": ["method=fairy2", "training.precision=bf16"],
}


QUICK = ("ternary", "rotated")  # the others take minutes together


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in METHODS]
)
def test_a_model_that_stays_in_its_file_gives_the_same_bits(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bf16(tmp_path, llama(tie_word_embeddings=method != "head"))
    more = (*METHODS[method], "training.pack=false")
    train_stage(load_config(settings(tmp_path, *more)), force=False)
    monkeypatch.setattr(preflight, "stays_stored", lambda config: False)
    train_stage(load_config(settings(tmp_path, *more, f"output_dir={tmp_path}/whole")), force=False)
    for name in ("final/model.safetensors", "final/config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours, theirs = (read_figures(tmp_path / name / RESULTS) for name in ("run", "whole"))
    assert (ours["full_precision"], ours["trained"]) == (theirs["full_precision"], theirs["trained"])


def in_files() -> Callable[[int], bool]:
    """Tells whether an address of this process is a page of a file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    spans = [tuple(int(place, 16) for place in line[0].split("-")) for line in lines]  # in order
    named = [line[-1].startswith("/") or line[-1] == "(deleted)" for line in lines]

    def is_file(place: int) -> bool:
        number = bisect.bisect_right(spans, (place, sys.maxsize)) - 1
        return number >= 0 and place < spans[number][1] and named[number]

    return is_file


def anonymous_bytes() -> int:
    """The bytes of all live tensors that are not in files, and that `gc` has not frozen."""
    tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]  # isinstance would ask lazy modules
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    sizes, is_file = {s.data_ptr(): s.nbytes() for s in storages}, in_files()
    return sum(size for place, size in sizes.items() if not is_file(place))


def counted(inner: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        result = inner(*args, **named)
        seen.append(anonymous_bytes())
        return result

    return call


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What tensors take behind each block, each measurement and each proof."""
    seen: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Rebuilding, "rebuild", counted(Rebuilding.rebuild, seen))
        patch.setattr(Run, "quality", counted(Run.quality, seen))
        patch.setattr(packed, "certify", counted(packed.certify, seen))
        gc.collect()
        gc.freeze()  # what is there already does not count
        yield seen
        gc.unfreeze()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "prove", lambda *given: None)  # in a process of its own
    peaks = []
    for number in (2, 6):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = llama(num_hidden_layers=number)
        block = 4 * sum(parameter.numel() for parameter in decoder_layers(model)[0].parameters())
        in_bf16(folder, model)
        with watched(monkeypatch) as seen:
            train_stage(load_config(settings(folder, *METHODS["BitNet"], "training.blockwise.steps=1")), force=False)
        assert len(seen) == number + 4  # measured three times, and proved once
        peaks.append(max(seen))
    assert peaks[1] - peaks[0] < block


def test_a_layer_is_narrow_again_after_a_failure(tmp_path: Path) -> None:
    in_bf16(tmp_path, llama())
    model, _ = load_stored(ModelConfig(name="toy", pretrained=str(tmp_path / "toy")))
    layer = decoder_layers(model)[0]
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    with pytest.raises(AttributeError, match="no attribute 'dtype'"):
        layer("no tensor")
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


def test_weights_of_two_dtypes_are_loaded_whole(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    model.model.norm.float()
    toy_files(tmp_path, model)
    config = ModelConfig(name="toy", pretrained=str(tmp_path / "toy"))
    ours, whole = load_stored(config)[0], load_pretrained(config)[0]
    assert not stored.is_stored(ours)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), whole.parameters(), strict=True))


LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.parametrize("method", ["fairy2", "bitdistill", "anemll", "uniform"])
def test_a_7b_model_needs_less_than_24_gb(method: str) -> None:
    config = load_config(["model=tiny", "training=blockwise", f"method={method}"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_7B, vocab_size=32000, tie_word_embeddings=False))
    assert sum(memory.of_blocks(model, config.method, config.training).values()) < 20e9
    config.training.max_steps = None
    assert sum(memory.of_training(model, config.training).values()) > 120e9


def test_a_run_for_which_there_is_no_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    with pytest.raises(UserError, match=r"takes about 50\d MB of memory \(two models.*, and 1\.00 MB are free: t"):
        train_stage(load_config(overrides(tmp_path)), force=False)
    with pytest.raises(UserError, match=r"of memory \(embedding and head .*training\.batch_size or .*with more"):
        train_stage(load_config(settings(tmp_path)), force=False)
    assert not (tmp_path / "run").exists()


def test_a_container_limits_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(memory, "AVAILABLE", said)
    monkeypatch.setattr(memory, "LIMIT", limit)
    assert memory.available() is None
    said.write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\n")
    assert memory.available() == 7 * 1024
    limit.write_text("max\n")
    assert memory.available() == 7 * 1024
    limit.write_text("4096\n")
    assert memory.available() == 4096


def test_a_run_for_which_the_disk_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_files(tmp_path)
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 500_000)  # final/ and blocks/ are 600 kB
    with pytest.raises(UserError, match="need 609 kB, and the disk has 500 kB"):
        train_stage(load_config(settings(tmp_path)), force=False)
