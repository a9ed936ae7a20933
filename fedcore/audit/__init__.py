"""Audits that try to break a claim of differential privacy; `fedcore.audit.run.audit` attacks a run."""
