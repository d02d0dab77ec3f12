"""Core AI programs: a decoder that converts, and what is read back from the file."""
