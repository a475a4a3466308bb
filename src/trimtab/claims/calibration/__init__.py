"""Claims of the calibrators."""
