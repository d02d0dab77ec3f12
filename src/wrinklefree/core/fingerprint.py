"""Short names for long things: 16 hexadecimal digits that change when a setting or a weight changes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

SAMPLES = 64  # values of each tensor that are looked at


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that stand for plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A fingerprint of names, shapes and some values of each tensor, spread evenly; it tells trained models apart."""
    sampled = []
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().tolist()
        sampled.append([name, list(tensor.shape), values])
    return fingerprint(sampled)
