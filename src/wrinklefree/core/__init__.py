"""Rank 0: codes, straight-through estimators, module surgery and the method contract. Needs torch alone."""
