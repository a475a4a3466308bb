"""The main job: measure a model, correct it, and report."""

from trimtab.audit.demo import demo
from trimtab.audit.result import AuditResult
from trimtab.audit.run import audit
from trimtab.audit.setup import Setup

__all__ = ["AuditResult", "Setup", "audit", "demo"]
