"""AutoRound's light recipe with 2 bits and an integer zero for each group of 64 columns, on the training text.

It runs in a process of its own (`auto_round_worker.py`), on a copy of the model in a folder.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from wrinklefree.compare import formulas
from wrinklefree.compare.others import Asked, Rounded
from wrinklefree.core.errors import UserError

WORKER = Path(__file__).with_name("auto_round_worker.py")
GROUP = 64
STEPS = 50  # a block, in the light recipe


def asymmetric(asked: Asked) -> Iterator[tuple[str, Rounded]]:
    """Round every layer. Raises UserError if AutoRound fails."""
    settings = {"bits": formulas.BITS, "group_size": GROUP, "sym": False, "iters": STEPS, "batch_size": 8}
    with TemporaryDirectory() as place:
        source, out = Path(place, "model"), Path(place, "out")
        asked.model.save_pretrained(source)
        asked.tokenizer.save_pretrained(source)
        out.mkdir()
        run(Path(sys.executable), source, out, settings, asked.rows())
        weights = load_file(out / "model.safetensors")
    for name, linear in asked.layers.items():
        bits = formulas.rtn_bits(GROUP) * linear.weight.numel()
        yield name, Rounded(weights[f"{name}.weight"].float(), bits)


def run(python: Path, source: Path, out: Path, settings: dict[str, Any], rows: torch.Tensor) -> None:
    """Run the worker with `python`, calibrated on token ids [rows, length]. Raises UserError if it fails."""
    command = [str(part) for part in (python, WORKER, source, out, json.dumps(settings))]
    if subprocess.run(command, input=json.dumps(rows.tolist()), text=True, stdout=sys.stderr).returncode:
        raise UserError("AutoRound failed; its message is above. Leave it out with --references")
