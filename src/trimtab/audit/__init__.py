"""The main job: measure a model, correct it, and report."""
