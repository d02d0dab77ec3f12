"""A packed model in transformers keeps one copy of its codes in memory: the kernels'. The buffers stay in the file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import batches, llama, tokenizer

from wrinklefree.core import library
from wrinklefree.core.method import find
from wrinklefree.export.formats.packed import export_packed

MAPS = Path("/proc/self/maps")

PROGRAM = """
import ctypes, json, sys
import torch
from transformers import AutoModelForCausalLM
import wrinklefree
from wrinklefree.packed.pack import packed_layers


def own() -> int:  # bytes of this process that are no file's
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def file_at(address: int) -> str:
    for line in open("/proc/self/maps"):
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line.split()[-1]
    return ""


model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
layers = list(packed_layers(model).values())
before = own()
with torch.no_grad():
    for layer in layers:
        layer(torch.ones(1, layer.in_features))
ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what was freed
print(json.dumps({
    "grown": own() - before,
    "kernels": sum(layer.product.matrix.nbytes for layer in layers),
    "files": sorted({file_at(layer.weight.data_ptr()) for layer in layers}),
}))
"""


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of a process's memory")
@pytest.mark.skipif(library.available() is not None, reason="needs the native library")
def test_codes_stay_in_the_file_and_kernels_have_the_only_copy(tmp_path: Path) -> None:
    """Eight blocks of 2.6 million weights take 5 MB at 2 bits, several times what else a product allocates."""
    method = find("uniform")(name="uniform")
    model = method.prepare(llama(hidden_size=512, intermediate_size=1024, num_attention_heads=4, num_hidden_layers=8))
    options = {"card": "", "force": False, "batches": batches(), "dense_dtype": "bfloat16", "snap_scales": True}
    export_packed(model, tokenizer(), method, tmp_path / "packed", **options)
    run = [sys.executable, "-c", PROGRAM, str(tmp_path / "packed")]
    figures = json.loads(subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert figures["files"] == [str(tmp_path / "packed" / "model.safetensors")]
    assert figures["kernels"] > 4 * 2**20
    assert figures["grown"] < 1.5 * figures["kernels"]
