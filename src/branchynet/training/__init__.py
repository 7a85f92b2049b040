"""Train all exits together, and store the state of a training run."""
