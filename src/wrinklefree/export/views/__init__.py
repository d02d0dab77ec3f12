"""Codes as other formats see them: ternary numbers, lookup tables."""
