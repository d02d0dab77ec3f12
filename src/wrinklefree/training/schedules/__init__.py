"""Learning-rate schedules, found by name: `rate(progress, settings)` is relative to the peak, after the warm-up."""
