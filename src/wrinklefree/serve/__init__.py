"""Rank 8: the OpenAI endpoint."""
