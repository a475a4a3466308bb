"""Layers and small networks that methods of the other stages are built of."""

from trimtab.nn.factored_output import FactoredOutput

__all__ = ["FactoredOutput"]
