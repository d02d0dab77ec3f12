"""Rank 2: GGUF files, read and written."""
