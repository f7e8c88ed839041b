"""Training with the Trainer of transformers: right sums over rows, ranks and steps, and checkpoints that are whole."""
