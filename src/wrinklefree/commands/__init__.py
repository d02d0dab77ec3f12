"""Rank 5: one file per `wf` verb; verbs never import each other."""
