"""One pass timed against the N samples, on the user's own machine."""
