"""Learning-rate schedules, found by name: `rate(progress, settings)` is the share of the peak after the warm-up."""
