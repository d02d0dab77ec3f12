"""Rank 5: a quantized model rebuilt from its original, one decoder block after the other, on a little text."""
