"""Quantize a model with AutoRound and save its dequantized weights. It runs in a venv of its own, with `auto-round`.

    PYTHON auto_round_worker.py MODEL OUT SETTINGS < ROWS

ROWS is a JSON list of calibration sequences of equal length. SETTINGS is a JSON object of keyword arguments for
AutoRound. `OUT/model.safetensors` gets the weights that the quantized model multiplies with, `OUT/cost.json` the time.
"""

import json
import sys
import time
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(source: str, out: Path, settings: str) -> None:
    torch.set_num_threads(1)
    rows = [torch.tensor([ids]) for ids in json.load(sys.stdin)]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    sizes = {"nsamples": len(rows), "seqlen": rows[0].shape[1]}
    wall = time.perf_counter()
    quantizer = AutoRound(
        model, tokenizer, dataset=rows, device_map="cpu", enable_torch_compile=False, **sizes, **json.loads(settings)
    )
    # The format `fake` keeps plain layers, whose weights were quantized and dequantized. It makes a folder of its own.
    quantizer.quantize_and_save(output_dir=str(out / "made"), format="fake")
    (made,) = (out / "made").glob("*/model.safetensors")
    made.rename(out / "model.safetensors")
    cost = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time()}
    (out / "cost.json").write_text(json.dumps(cost))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
