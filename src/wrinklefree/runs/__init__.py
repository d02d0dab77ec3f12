"""Rank 7: one stage, from its config to its report."""
