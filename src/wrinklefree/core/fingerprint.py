"""Fingerprints of settings and weights: 16 hexadecimal digits that change if a value changes."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

SAMPLES = 64  # values per tensor: enough to tell trained models apart, and far cheaper than hashing every weight


def fingerprint(value: Any) -> str:
    """Hash plain values (numbers, texts, lists, dictionaries) to 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def model_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Hash each tensor's name, shape and `SAMPLES` evenly spaced values to 16 hexadecimal digits."""
    sampled = []
    for name, tensor in sorted(weights.items()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].float().tolist()
        sampled.append([name, list(tensor.shape), values])
    return fingerprint(sampled)
