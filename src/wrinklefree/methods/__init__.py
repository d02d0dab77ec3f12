"""Rank 2: one quantizer each, found by its name."""
