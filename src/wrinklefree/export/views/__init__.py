"""Quantized layers as other formats see them: ternary matrices, lookup tables, dense weights."""
