"""Rank 3: what a batch is trained for, found by name."""
