"""Measure speed and quality next to the alternative, in the same run. LOG.md has the figures."""
