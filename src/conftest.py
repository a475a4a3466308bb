"""Doctests of modules whose optional packages are not installed are left out."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("flwr") else ["trimtab/federated.py"]
