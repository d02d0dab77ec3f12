"""Asks vLLM's own loader code whether it takes folders of `--format compressed-tensors`.

    python -m benchmarks.vllm_layout [--json]

Writes small ternary models, one for each way of scaling. For each linear layer, vLLM parses `config.json`, chooses its
scheme and makes its parameters. Names, shapes and codes of the folder are compared with them. No kernel runs, since
vLLM's kernels for 2 bits (Humming) need CUDA. vllm 0.33 has to be in Python's path; the wheel, unpacked, is enough.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.tiny import tokenizer
from wrinklefree.core.method import quant_layers
from wrinklefree.export.formats import compressed_tensors
from wrinklefree.export.views.ternary import ternary_layers
from wrinklefree.methods import bitdistill

CASES: dict[str, dict[str, Any]] = {
    "a scale per tensor": {"granularity": "tensor", "activation_bits": None},
    "a scale per row": {"granularity": "row", "activation_bits": None},
    "groups of 64": {"granularity": "group", "group_size": 64, "activation_bits": None},
    "groups of 128": {"granularity": "group", "group_size": 128, "activation_bits": None},
    "groups of 128, int8 inputs": {"granularity": "group", "group_size": 128},
}


def small() -> PreTrainedModel:
    """Return a Llama whose widths are multiples of 128."""
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=96, max_position_embeddings=64)).eval()


def check(settings: dict[str, Any], words: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Export one model and compare each layer with what vLLM makes room for. Returns what vLLM chose.

    Raises AssertionError if a name, shape, type or code differs, and what vLLM raises if it refuses the folder.
    """
    model = bitdistill.Config(norm_mode="none", **settings).prepare(small()).eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = torch.arange(32).reshape(2, 16)
        compressed_tensors.write(model, words, folder, [{"input_ids": ids}])
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        stored = load_file(folder / "model.safetensors")
    codes = {fqn: layer.codes for fqn, layer in ternary_layers(model, "compressed-tensors").items()}
    chosen = {chosen_scheme(config, fqn, codes[fqn], stored) for fqn in quant_layers(model)}
    (scheme,) = chosen
    return {"scheme": scheme, "layers": len(codes)}


def chosen_scheme(config: dict[str, Any], fqn: str, codes: Tensor, stored: dict[str, Tensor]) -> str:
    """Let vLLM load one layer, and return the name of its scheme and what the kernel would be asked for."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    class Linear(LinearBase):  # type: ignore[misc]
        """vLLM's layer without its parallel workers."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

    parsed = CompressedTensorsConfig.from_config(json.loads(json.dumps(config)))
    layer = Linear()
    with mock.patch.object(CompressedTensorsConfig, "_check_scheme_supported"):  # asks for a GPU
        scheme = parsed.get_scheme(layer, fqn)
    assert scheme is not None, f"{fqn}: vLLM would leave it unquantized"
    rows, columns = codes.shape
    asked: list[Any] = []
    # The choice of a kernel asks for a GPU; what it would be asked for is kept.
    alone: dict[str, Any] = {
        "get_tensor_model_parallel_rank": lambda: 0,
        "get_tensor_model_parallel_world_size": lambda: 1,
    }
    with (
        mock.patch(f"{type(scheme).__module__}.choose_mp_linear_kernel", lambda wanted: _kernel(asked, wanted)),
        mock.patch.multiple("vllm.model_executor.parameter", **alone),
    ):
        scheme.create_weights(layer, rows, columns, [rows], columns, torch.float16, lambda *_: None)
    for name, room in layer.named_parameters():
        found = stored[f"{fqn}.{name}"]
        assert found.shape == room.shape, f"{fqn}.{name}: {tuple(found.shape)}, vLLM has room for {tuple(room.shape)}"
        assert found.dtype == room.dtype or room.dtype == torch.float16, f"{fqn}.{name}: {found.dtype}"
    given = {name.removeprefix(f"{fqn}.") for name in stored if name.startswith(f"{fqn}.")}
    assert given == {name for name, _ in layer.named_parameters()}, f"{fqn}: {given}"
    assert torch.equal(unpack_from_int32(stored[f"{fqn}.weight_packed"], 2, codes.shape), codes), f"{fqn}: codes"
    (wanted,) = asked
    return f"{type(scheme).__name__}, {wanted.weight_type}, groups of {wanted.group_size}"


def _kernel(asked: list[Any], wanted: Any) -> type:
    """Keep what is asked of a kernel, and return a class that takes what vLLM gives its kernels."""
    asked.append(wanted)
    return type("NoKernel", (), {"__init__": lambda self, *args, **names: None})


def main() -> None:
    """Print one line for each way of scaling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--quick", action="store_true", help="the first and the fourth case")
    args = parser.parse_args()
    words = tokenizer()
    cases = list(CASES.items())[:: 3 if args.quick else 1]
    results = {name: check(settings, words) for name, settings in cases}
    if args.json:
        print(json.dumps(results))
        return
    for name, result in results.items():
        print(f"{name:28} {result['layers']} layers: {result['scheme']}")


if __name__ == "__main__":
    main()
