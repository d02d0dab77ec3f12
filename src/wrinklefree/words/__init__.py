"""Rank 2: what a person types behind `wf`, and what was meant."""
