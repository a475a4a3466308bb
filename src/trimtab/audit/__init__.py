"""The main job: measure a model, correct it, and report."""

from trimtab.audit.adapt import adapt
from trimtab.audit.demo import demo
from trimtab.audit.detection import audit_detections
from trimtab.audit.result import AuditResult, DetectionAudit
from trimtab.audit.run import audit
from trimtab.audit.setup import Setup

__all__ = ["AuditResult", "DetectionAudit", "Setup", "adapt", "audit", "audit_detections", "demo"]
