"""Rank 1: what is known of model architectures, said once."""
