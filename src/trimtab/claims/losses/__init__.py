"""Claims of the training objectives."""
