"""Layers and small networks that methods of the other stages are built of."""

__all__: list[str] = []
