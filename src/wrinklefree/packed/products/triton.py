"""Multiply few tokens with packed codes on a GPU, in Triton.

At batch 1 a GPU waits for its memory, so reading weights as 1 to 4 bits saves time. For many tokens a matrix product
with the decoded weight is faster.

    table    weight uint8 [n, k bits / 8], bits 1, 2, 4 or 8        y = row * sum_k table[code] scales[r, g] col x
    complex  weight uint8 [2 (U, W), T, n / 2, k / 8], 2 bits       y = U z + W conj(z), z the halves of col x

Scales are [R, G] and [2, T, 2, R, G] as in core/forms.py. Sums are in fp32. TRITON_INTERPRET=1 runs the programs on a
CPU, slowly; the tests do so.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from wrinklefree.core.codes import Codes
from wrinklefree.core.forms import Complex, Form, Table
from wrinklefree.packed.products.coded import FewTokens

ROWS, BYTES = 16, 64  # the tile: a program takes ROWS rows and walks along them, BYTES packed bytes at a time


@triton.jit
def _table_kernel(
    weight,
    table,
    scales,
    x,
    y,
    n,
    k,
    width,
    groups,
    group_size,
    ROW_SCALES: tl.constexpr,
    BITS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1)
    scale_rows = rows if ROW_SCALES else tl.zeros_like(rows)
    sums = tl.zeros((TILE_ROWS, TILE_BYTES), dtype=tl.float32)
    for start in range(0, width, TILE_BYTES):
        at = start + tl.arange(0, TILE_BYTES)
        inside = (rows[:, None] < n) & (at[None, :] < width)
        packed = tl.load(weight + rows[:, None] * width + at[None, :], mask=inside, other=0)
        for lane in tl.static_range(8 // BITS):
            column = at * (8 // BITS) + lane
            code = (packed >> (lane * BITS)) & ((1 << BITS) - 1)
            there = inside & (column[None, :] < k)
            value = tl.load(table + code.to(tl.int32), mask=there, other=0.0)
            group = column // group_size
            scale = tl.load(scales + scale_rows[:, None] * groups + group[None, :], mask=there, other=0.0)
            z = tl.load(x + token * k + column, mask=column < k, other=0.0)
            sums += value * scale * z[None, :]
    tl.store(y + token * n + rows, tl.sum(sums, axis=1), mask=rows < n)


@triton.jit
def _complex_kernel(
    weight,
    scales,
    x,
    y,
    n,  # complex rows
    k,  # complex columns
    width,
    groups,
    group_size,
    scale_rows,
    STAGES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_BYTES: tl.constexpr,
):
    rows = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    token = tl.program_id(1)
    scale_row = tl.minimum(rows, scale_rows - 1)
    real = tl.zeros((TILE_ROWS, TILE_BYTES), dtype=tl.float32)
    imaginary = tl.zeros((TILE_ROWS, TILE_BYTES), dtype=tl.float32)
    for start in range(0, width, TILE_BYTES):
        at = start + tl.arange(0, TILE_BYTES)
        inside = (rows[:, None] < n) & (at[None, :] < width)
        for lane in tl.static_range(4):
            column = at * 4 + lane
            there = inside & (column[None, :] < k)
            x_re = tl.load(x + token * 2 * k + column, mask=column < k, other=0.0)[None, :]
            x_im = tl.load(x + token * 2 * k + k + column, mask=column < k, other=0.0)[None, :]
            group = column // group_size
            for part in tl.static_range(2):
                for stage in tl.static_range(STAGES):
                    plane = part * STAGES + stage
                    packed = tl.load(weight + (plane * n + rows[:, None]) * width + at[None, :], mask=inside, other=0)
                    code = ((packed >> (lane * 2)) & 3).to(tl.int32)
                    place = (plane * 2 * scale_rows + scale_row[:, None]) * groups + group[None, :]
                    s_re = tl.load(scales + place, mask=there, other=0.0)
                    s_im = tl.load(scales + place + scale_rows * groups, mask=there, other=0.0)
                    sign = (1 - (code & 2)).to(tl.float32)
                    odd = (code & 1).to(tl.float32)
                    re = sign * (1 - odd) * s_re
                    im = sign * odd * s_im
                    # U z = (re x_re - im x_im, im x_re + re x_im). In W conj(z), x_im has the other sign.
                    conjugate = 1 - 2 * part
                    real += re * x_re - conjugate * im * x_im
                    imaginary += im * x_re + conjugate * re * x_im
    tl.store(y + token * 2 * n + rows, tl.sum(real, axis=1), mask=rows < n)
    tl.store(y + token * 2 * n + n + rows, tl.sum(imaginary, axis=1), mask=rows < n)


def table_product(weight: Tensor, bits: int, table: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """Multiply x fp32 [B, k] with a table's codes: fp32 [B, n].

    `weight` uint8 [n, bytes] packed; `table` fp32 [2**bits]; `scales` fp32 [1 or n, G].
    """
    (n, width), (tokens, k) = weight.shape, x.shape
    y = torch.empty(tokens, n, dtype=torch.float32, device=x.device)
    _table_kernel[(triton.cdiv(n, ROWS), tokens)](
        weight,
        table,
        scales,
        x,
        y,
        n,
        k,
        width,
        scales.shape[1],
        k // scales.shape[1],
        ROW_SCALES=scales.shape[0] > 1,
        BITS=bits,
        TILE_ROWS=ROWS,
        TILE_BYTES=BYTES,
    )
    return y


def complex_product(weight: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """Multiply x fp32 [B, 2 m] with complex codes: fp32 [B, 2 n].

    `weight` uint8 [2 (U, W), T, n, ceil(m / 4)] packed; `scales` fp32 [2, T, 2 (re, im), 1 or n, G].
    """
    _, stages, n, width = weight.shape
    tokens, m = x.shape[0], x.shape[1] // 2
    y = torch.empty(tokens, 2 * n, dtype=torch.float32, device=x.device)
    _complex_kernel[(triton.cdiv(n, ROWS), tokens)](
        weight,
        scales,
        x,
        y,
        n,
        m,
        width,
        scales.shape[4],
        m // scales.shape[4],
        scales.shape[3],
        STAGES=stages,
        TILE_ROWS=ROWS,
        TILE_BYTES=BYTES,
    )
    return y


@dataclass(frozen=True)
class TritonProduct(FewTokens):
    """Multiplies a packed layer by one of these programs. All its tensors are fp32 on the layer's device."""

    bits: int
    table: Tensor | None  # None means complex codes
    scales: Tensor
    row: Tensor | None
    col: Tensor | None

    def few(self, weight: Tensor, x: Tensor) -> Tensor:
        z = x.float().flatten(0, -2)
        z = z.contiguous() if self.col is None else z * self.col
        if self.table is None:
            y = complex_product(weight, self.scales, z)
        else:
            y = table_product(weight, self.bits, self.table, self.scales, z)
        return (y if self.row is None else y * self.row).unflatten(0, x.shape[:-1])


def product(form: Form | None, codes: Codes, device: torch.device) -> TritonProduct | None:
    """The product for a layer with `codes`, or None if no program reads them. That is so if

    - `form` has codes of its own, or none: the programs read the layer's packed codes,
    - a code crosses bytes (3 bits),
    - a table has several ranks,
    - the form is padded.
    """
    if codes.bits == 3 or not isinstance(form, (Table, Complex)) or form.index is not codes.index:
        return None
    if isinstance(form, Table) and form.rank > 1:
        return None
    whole = form.index.shape[-2:] if isinstance(form, Table) else [2 * size for size in form.index.shape[-2:]]
    if list(whole) != list(codes.shape):
        return None
    table = form.table if isinstance(form, Table) else None

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device, torch.float32)

    scales = form.scales.to(device, torch.float32)
    return TritonProduct(codes.bits, moved(table), scales, moved(form.row), moved(form.col))
