"""Time llama.cpp on the same model shapes, with random weights that llama.cpp quantizes itself.

It needs the packages `llama-cpp-python` (which `make test-gguf` installs) and `gguf`. Each model runs in a process of
its own, which waits between bursts and uses the C API of llama.cpp:

    python -m benchmarks.llama_cpp_peer FILE THREADS
"""

import ctypes
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wrinklefree.gguf.blocks import FLOATS, INTEGERS, Kind, pack

DECODED, PROMPT = 24, 128  # tokens of one burst


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int


def write(shape: Shape, file: Path) -> None:
    """Write a GGUF file with random fp16 weights."""
    import gguf

    writer = described(shape, file, gguf.LlamaFileType.MOSTLY_F16)
    noise = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32).astype(np.float16) * np.float16(0.02)
    for name, dims in tensors(shape).items():
        if len(dims) == 1:
            writer.add_tensor(name, np.ones(dims, dtype=np.float32))
        else:
            writer.add_tensor(name, np.resize(noise, dims))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ternary(shape: Shape, folder: Path) -> Path:
    """The GGUF file of this shape in Q2_0, with embedding and head in Q8_0. It is made if `folder` lacks it."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"llama_{shape.layers}x{shape.hidden}_ternary_Q2_0.gguf"
    if out.exists():
        return out
    draw = np.random.default_rng(0)
    writer = described(shape, out.with_suffix(".part"), 41)
    data = {name: _random_blocks(name, dims, draw) for name, dims in tensors(shape).items()}
    for name, dims in tensors(shape).items():
        kind = _kind(name, dims)
        writer.add_tensor_info(name, dims, np.dtype(np.float32), data[name].nbytes, raw_dtype=kind.number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for values in data.values():
        writer.write_tensor_data(values)
    writer.close()
    return out.with_suffix(".part").rename(out)


def _kind(name: str, dims: tuple[int, ...]) -> Kind:
    if len(dims) == 1:
        return FLOATS["F32"]
    return INTEGERS["Q8_0" if name in ("token_embd.weight", "output.weight") else "Q2_0"]


def _random_blocks(name: str, dims: tuple[int, ...], draw: np.random.Generator) -> np.ndarray:
    kind = _kind(name, dims)
    if len(dims) == 1:
        return np.ones(dims, dtype=np.float32)
    most = min(kind.most, 127) if kind is INTEGERS["Q8_0"] else 1
    integers = draw.integers(-most, most + 1, dims, dtype=np.int8)
    scales = np.full((dims[0], dims[1] // kind.columns), 2.0**-6 / most, dtype=np.float16).astype(np.float32)
    return pack("Q2_0" if most == 1 else "Q8_0", integers, scales)


def described(shape: Shape, file: Path, file_type: int) -> Any:
    """A writer that knows the sizes of a model without a tokenizer."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(file_type)
    return writer


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The names and dimensions [out, in] of all tensors. The head is not tied to the embedding."""
    h, inner, kv = shape.hidden, shape.intermediate, shape.kv_heads * (shape.hidden // shape.heads)
    dims: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab, h), "output_norm.weight": (h,)}
    dims["output.weight"] = (shape.vocab, h)
    one = {"attn_norm": (h,), "attn_q": (h, h), "attn_k": (kv, h), "attn_v": (kv, h), "attn_output": (h, h)}
    one |= {"ffn_norm": (h,), "ffn_gate": (inner, h), "ffn_up": (inner, h), "ffn_down": (h, inner)}
    for layer in range(shape.layers):
        dims |= {f"blk.{layer}.{name}.weight": each for name, each in one.items()}
    return dims


def quantized(shape: Shape, kind: str, folder: Path) -> Path:
    """The GGUF file of this shape in a type such as `TQ2_0` or `Q4_0`. It is made if `folder` lacks it."""
    import llama_cpp

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"llama_{shape.layers}x{shape.hidden}_{kind}.gguf"
    if out.exists():
        return out
    plain = folder / "f16.gguf"
    write(shape, plain)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = 1
    aside = out.with_suffix(".part")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(aside).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp did not quantize {plain} to {kind}")
    plain.unlink()
    return aside.rename(out)


class Worker:
    """A process that runs one model with a number of threads."""

    def __init__(self, file: Path, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.llama_cpp_peer", str(file), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def burst(self) -> dict[str, float]:
        """Tokens per second in one burst: `decode` for new tokens, `prefill` for reading a prompt."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("burst\n")
        self.process.stdin.flush()
        speeds: dict[str, float] = json.loads(self.process.stdout.readline())
        return speeds

    def close(self) -> None:
        self.process.communicate()


def serve(file: Path, threads: int) -> None:
    """Run a burst for each line on standard input, and print its figures as a line of JSON."""
    import llama_cpp as api

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    api.llama_backend_init()
    model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 512, PROMPT, PROMPT
    settings.n_threads = settings.n_threads_batch = threads
    context = api.llama_init_from_model(model, settings)

    def feed(count: int) -> float:
        ids = (api.llama_token * count)(*range(3, 3 + count))
        before = time.perf_counter()
        if api.llama_decode(context, api.llama_batch_get_one(ids, count)):
            raise RuntimeError("llama_decode failed")
        api.llama_synchronize(context)
        return time.perf_counter() - before

    for _ in sys.stdin:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        prefill = PROMPT / feed(PROMPT)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        feed(8)
        print(json.dumps({"decode": DECODED / sum(feed(1) for _ in range(DECODED)), "prefill": prefill}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
