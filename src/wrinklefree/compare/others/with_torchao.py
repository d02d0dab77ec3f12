"""torchao's integers: 8 bits with a scale per row, 4 with one per group of 32 columns. Scales count as fp16."""

import math
from collections.abc import Iterator

import torch
from torch import nn

from wrinklefree.compare.others import Asked, Rounded

GROUP = 32


def integers(bits: int, asked: Asked) -> Iterator[tuple[str, Rounded]]:
    """Round every layer with `IntxWeightOnlyConfig`."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    for name, linear in asked.layers.items():
        columns = linear.in_features if bits == 8 else math.gcd(GROUP, linear.in_features)
        granularity = PerAxis(0) if bits == 8 else PerGroup(columns)
        config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity)
        held = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False))
        held[0].weight = nn.Parameter(linear.weight.data.float())
        quantize_(held, config)
        yield name, Rounded(held[0].weight.dequantize(), (bits + 16 / columns) * linear.weight.numel())
