"""One export format each, found by its name."""
