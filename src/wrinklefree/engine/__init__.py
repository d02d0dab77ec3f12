"""Rank 3: the native decode loop."""
