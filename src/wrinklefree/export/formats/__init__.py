"""Export formats, found by name: each file defines `write` and states the rest about itself (`export/flags.py`)."""
