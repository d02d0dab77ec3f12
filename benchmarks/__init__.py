"""Speed and quality, measured side by side with the alternative; LOG.md has the figures."""
