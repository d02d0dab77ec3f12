"""Rank 3: text to batches, from any exact position."""
