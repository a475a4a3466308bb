"""Claims of the metrics stage."""
