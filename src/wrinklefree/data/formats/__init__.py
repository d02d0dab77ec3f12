"""Data formats, found by name: `document(row, reading, where)` turns a dataset's row into a document."""
