"""Core ML programs: how one is written, and an interpreter that runs it anywhere."""
