"""After training, on scores: calibrators that turn logits into true probabilities."""
