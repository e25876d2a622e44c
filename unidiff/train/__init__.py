"""Training: settings, token sources, task mixture, the step, and the run around it."""
