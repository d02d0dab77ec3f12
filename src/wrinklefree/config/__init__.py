"""Rank 1: from YAML and KEY=VALUE to one checked object."""
