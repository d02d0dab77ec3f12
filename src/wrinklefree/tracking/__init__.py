"""Rank 2: what a person sees of a run."""
