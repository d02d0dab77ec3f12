"""The KD cache: a teacher's answers on disk."""
