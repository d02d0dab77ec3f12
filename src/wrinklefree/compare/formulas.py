"""The one-shot quantizers of others, as published: a weight [out, in] -> the weight that its codes stand for.

Groups are of consecutive columns of a row, w one group:

    round to nearest    s = (max(w, 0) - min(w, 0)) / 3    z = round(-min(w, 0) / s)    q = clip(round(w / s) + z, 0, 3)
    HQQ                 the same with a real z, moved by half-quadratic steps that allow for a few large errors e:

        e = shrink(w - s (q - z))        z = mean(q - (w - e) / s)
        shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)                p = 0.7, beta = 10

HQQ: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The text lets beta grow by
1 % a step. The default of its package, hqq 0.2.8, does not; nor do we, and get its codes (LOG.md).
Scales and real zeros are stored in fp16, integer zeros with the bits of a code.
"""

from collections.abc import Callable
from typing import Final

from torch import Tensor

Quantizer = Callable[[Tensor, int], Tensor]  # weight [out, in], group size -> dequantized weight

BITS: Final = 2
MOST = 2**BITS - 1
POWER, BETA, STEPS = 0.7, 10.0, 20
SMALLEST = 2.0**-24  # the smallest positive fp16 number


def rtn_bits(group: int, zeros: bool = True) -> float:
    """Bits per weight: codes, a scale for each group, and an integer zero if there are any."""
    return BITS + (16 + BITS * zeros) / group


def hqq_bits(group: int) -> float:
    """Bits per weight: codes, a scale and a real zero for each group."""
    return BITS + (16 + 16) / group


def rtn(weight: Tensor, group: int) -> Tensor:
    """Round to nearest, between the least and the largest weight of a group."""
    w = weight.unflatten(1, (-1, group))
    low, high = w.amin(-1, keepdim=True).clamp_max(0), w.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / MOST).half().float().clamp_min(SMALLEST)
    zero = (-low / scale).round()
    q = ((w / scale).round() + zero).clamp(0, MOST)
    return (scale * (q - zero)).flatten(1)


def hqq(weight: Tensor, group: int) -> Tensor:
    """Move the zeros of each group until the mean error of all weights no longer falls."""
    w = weight.unflatten(1, (-1, group))
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    scale = MOST / (high - low).clamp_min(1e-4)  # the published code multiplies by it
    zero = -low * scale
    least = float("inf")
    for _ in range(STEPS):
        q = (w * scale + zero).round().clamp(0, MOST)
        error = w - (q - zero) / scale
        zero = (q - (w - shrink(error)) * scale).mean(-1, keepdim=True)
        if error.abs().mean().item() >= least:
            break  # with the newest zeros, as published
        least = error.abs().mean().item()
    scale, zero = 1 / (1 / scale).half().float(), zero.half().float()
    q = (w * scale + zero).round().clamp(0, MOST)
    return ((q - zero) / scale).flatten(1)


def shrink(x: Tensor) -> Tensor:
    """Pull errors towards 0, small ones all the way."""
    return x.sign() * (x.abs() - x.abs().pow(POWER - 1) / BETA).clamp_min(0)
