"""Rank 3: one file per target format."""
