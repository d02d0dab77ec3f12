"""Data formats, found by name: `document(row, reading, where)` makes a row of a data set a document."""
