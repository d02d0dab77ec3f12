"""Rank 4: a trained model for others, proved."""
