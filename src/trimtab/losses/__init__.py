"""Training objectives: losses that leave a model right, not only confident."""

__all__: list[str] = []
