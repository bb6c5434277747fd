"""What the log lines of whoever works on a job bear."""

from __future__ import annotations

from app.db.orm import Job

_WHO = {"key": "key_id", "oidc": "subject"}  # by the beginning of an actor, as `app.audit` has it


def log_context(job: Job) -> dict[str, str]:
    """Its ids, and those of the request that submitted it: by the names that the API's own lines have."""
    told = {"correlation_id": job.correlation_id, "job_id": job.id, "tenant_id": job.tenant_id}
    kind, _, who = (job.actor or "").partition(":")
    if kind in _WHO:
        told[_WHO[kind]] = who
    return told
