"""Rank 9: one file for each verb of `wf`."""
