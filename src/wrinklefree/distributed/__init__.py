"""Rank 2: several processes, sharing or sharding a model."""
