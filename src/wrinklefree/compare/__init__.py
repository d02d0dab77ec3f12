"""Rank 8: methods side by side on one model."""
