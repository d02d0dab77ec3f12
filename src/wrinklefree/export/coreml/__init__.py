"""Core ML programs: a writer, and an interpreter that runs them on any machine."""
