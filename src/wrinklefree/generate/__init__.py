"""Rank 6: text from a model."""
