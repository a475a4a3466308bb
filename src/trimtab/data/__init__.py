"""What a model learns from and meets: sources, corruptions, streams."""
