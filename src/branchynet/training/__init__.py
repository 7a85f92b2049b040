"""Training all exits together, and the state of a training on disk."""
