"""Rank 4: how good and how fast a model is."""
