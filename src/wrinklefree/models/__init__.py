"""Rank 5: any name or folder to a model, loudly."""
