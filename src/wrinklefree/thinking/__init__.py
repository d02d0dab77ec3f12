"""Rank 8: LLM-TRM, all of it."""
