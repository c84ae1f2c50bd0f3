"""Training: trainer, checkpoints, EMA, learning rates."""
