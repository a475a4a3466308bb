"""The report: an audit's findings as one HTML file that opens anywhere and fetches nothing."""

from trimtab.audit.report.page import render, write

__all__ = ["render", "write"]
