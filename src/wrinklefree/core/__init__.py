"""Rank 0: what a quantized layer is; it needs torch alone."""
