"""A teacher's answers on disk."""
