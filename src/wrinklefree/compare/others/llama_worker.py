"""llama.cpp in a process of its own, by the C API that `llama-cpp-python` gives to Python. It needs numpy besides.

    PYTHON llama_worker.py quantize SOURCE TARGET KIND IMPORTANCE
    PYTHON llama_worker.py logits FILE < LINES

quantize  SOURCE is a GGUF file in 16 bits, KIND a type such as Q2_K. IMPORTANCE is an npz file: the mean square of each
          input of a tensor, by llama.cpp's name of the tensor. The embedding gets 8 bits.
logits    Each line is a JSON list of token ids. The answer is their logits, fp32 [length, words], as bytes.
"""

import ctypes
import json
import sys
from collections.abc import Callable

import llama_cpp as api
import numpy as np

CONTEXT = 512


def quantize(source: str, target: str, kind: str, importance: str) -> None:
    settings = api.llama_model_quantize_default_params()
    settings.ftype = vars(api)[f"LLAMA_FTYPE_MOSTLY_{kind}"]
    settings.nthread = 1
    settings.token_embedding_type = settings.output_tensor_type = api.GGML_TYPE_Q8_0
    settings.imatrix = entries(importance)
    if api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp did not quantize {source} to {kind}")


def entries(file: str) -> ctypes.Array:  # type: ignore[type-arg]
    """The importance of all tensors as llama.cpp takes it. An entry without a name ends the list."""
    tensors = {name: values.astype(np.float32) for name, values in np.load(file).items()}
    listed = (api.llama_model_imatrix_data * (len(tensors) + 1))()
    for entry, (name, values) in zip(listed, tensors.items(), strict=False):
        numbers = (ctypes.c_float * len(values))(*values)
        entry.name, entry.data, entry.size = name.encode(), numbers, len(values)
    return listed


def logits(file: str) -> None:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(file.encode(), api.llama_model_default_params())
    words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = CONTEXT
    settings.n_threads = settings.n_threads_batch = 1
    context = api.llama_init_from_model(model, settings)
    for line in sys.stdin:
        ids = json.loads(line)
        api.llama_memory_clear(api.llama_get_memory(context), True)
        if api.llama_decode(context, all_outputs(ids)):
            raise RuntimeError("llama_decode failed")
        rows = np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(ids), words))
        sys.stdout.buffer.write(rows.astype(np.float32).tobytes())
        sys.stdout.buffer.flush()


def all_outputs(ids: list[int]) -> api.llama_batch:
    """A batch of one sequence whose logits are wanted at every position."""
    batch = api.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    return batch


if __name__ == "__main__":
    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, None)
    commands: dict[str, Callable[..., None]] = {"quantize": quantize, "logits": logits}
    work = commands[sys.argv[1]]
    work(*sys.argv[2:])
