"""Reads a Core AI asset back: the constants of its program, and its logits by Core AI's own runtime on this CPU."""

import asyncio
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from coreai._compiler.ir import DenseElementsAttr
from coreai.authoring import AIModelAsset
from coreai.runtime import AIModel, NDArray
from torch import Tensor, nn

from wrinklefree.export.coreai.program import cache_shape
from wrinklefree.export.views.decoder import Sizes

Constant = tuple[str, bytes]  # element type, and the bytes as they are packed


def constants(asset: Path) -> dict[str, set[Constant]]:
    """Return the constants of each function of an asset. A constant of equal entries is written out in full."""
    module = AIModelAsset.load(asset).program._module._mlir_module
    blobs = _blobs(str(module))
    return {
        str(graph.attributes["sym_name"].value): {
            _constant(operation.attributes["value"], blobs)
            for operation in graph.regions[0].blocks[0].operations
            if operation.operation.name == "coreai.constant"
        }
        for graph in module.body.operations
    }


def _blobs(text: str) -> dict[str, bytes]:
    """Return the large constants by their keys, from a printed program: nothing else gives their bytes."""
    found = re.finditer(r'(\w+): "0x([0-9A-Fa-f]+)"', text)
    return {match[1]: bytes.fromhex(match[2])[4:] for match in found}  # the first four bytes are the alignment


def _constant(value: Any, blobs: dict[str, bytes]) -> Constant:
    kind = re.search(r"[<x]([a-z]+[0-9]+)>$", str(value.type))
    assert kind is not None, value.type
    if DenseElementsAttr.isinstance(value):
        return kind[1], np.array(DenseElementsAttr(value)).tobytes()
    key = re.match(r"dense_resource<(\w+)>", str(value))
    assert key is not None, str(value)[:100]
    return kind[1], blobs[key[1]]


class Runner(nn.Module):
    """Calls an asset's `prefill` and `decode` like a transformers model, on ids [1, L]. Use it as a context manager."""

    def __init__(self, asset: Path, sizes: Sizes, prefill: int) -> None:
        super().__init__()
        self.sizes, self.width = sizes, prefill
        self.folder = Path(tempfile.mkdtemp(suffix=".aimodel"))
        self.loop = asyncio.new_event_loop()
        self.functions = self._compiled(asset)

    def _compiled(self, asset: Path) -> dict[str, Any]:
        # The system's own Core AI compiles an asset when it is loaded. The package's runtime does not, so its compiler
        # is called first; there is no public name for that.
        shutil.copytree(asset, self.folder, dirs_exist_ok=True)
        AIModelAsset.load(asset)._write_odix(self.folder)
        (self.folder / "main-universal.odix").rename(self.folder / "program.odix")
        model = self.loop.run_until_complete(AIModel.load(self.folder))
        return {name: model.load_function(name) for name in ("prefill", "decode")}

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()
        shutil.rmtree(self.folder)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """Return an object with `logits`, fp32 [1, L, vocabulary]. Each call starts with an empty cache."""
        state = {name: NDArray(np.zeros(cache_shape(self.sizes), np.float16)) for name in ("k_cache", "v_cache")}
        ids = input_ids.cpu().int()
        pieces = [self._call(name, ids[:, a:b], a, state) for name, a, b in self._steps(ids.shape[1])]
        return SimpleNamespace(logits=torch.cat(pieces, 1).to(input_ids.device))

    def _steps(self, length: int) -> Iterator[tuple[str, int, int]]:
        """Yield (function, start, end): `prefill` as often as it fits, then `decode` for each remaining id.

        At least one id is left for `decode`, so that both functions, and the cache between them, are tested.
        """
        chunks = (length - 1) // self.width
        yield from (("prefill", k * self.width, (k + 1) * self.width) for k in range(chunks))
        yield from (("decode", k, k + 1) for k in range(chunks * self.width, length))

    def _call(self, name: str, ids: Tensor, position: int, state: dict[str, Any]) -> Tensor:
        feed = {"input_ids": NDArray(ids.numpy()), "position": NDArray(np.array([position], np.int32))}
        logits = self.loop.run_until_complete(self.functions[name](feed, state))["logits"]
        return torch.from_numpy(logits.numpy().astype(np.float32))
