"""Rank 4: the one loop and what it leaves."""
