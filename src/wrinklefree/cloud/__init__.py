"""Rank 8: training somewhere else: what it will take, where it runs, and how to watch it."""
