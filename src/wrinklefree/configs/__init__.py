"""The YAML groups that Hydra composes; nothing else."""
