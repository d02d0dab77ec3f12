"""Proofs that an exported model is the trained one."""
