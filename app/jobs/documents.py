"""Jobs as clients poll them. Most polls find nothing new, so a poll asks the database for the version only, and a
document is rendered once per version: the version grows with every change that a client can see. What a queued job can
expect changes without; its document is rendered once for each of that, too."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from app.blobs.retention import Policies
from app.db.orm import Job
from app.domain.job_state import JobStatus
from app.jobs.outlook import Outlook, Outlooks
from app.jobs.schemas import is_terminal, job_etag, job_json
from app.jobs.service import JobService

_KEPT_BYTES = 32 << 20
_OVERHEAD = 500  # of one document beside its body


@dataclass(frozen=True)
class JobDocument:
    """A rendered job: JSON, strong ETag. `days`: after which it expires once it has ended."""

    version: int
    days: int | None
    status: str
    terminal: bool
    etag: str
    body: bytes
    outlook: Outlook | None = None


class JobDocuments:
    """Keeps the newest document of the jobs last asked for, up to so many bytes in all. Threads may share it."""

    def __init__(self, jobs: JobService, outlooks: Outlooks, policies: Policies, kept_bytes: int = _KEPT_BYTES) -> None:
        self._jobs, self._outlooks, self._policies = jobs, outlooks, policies
        self._most = kept_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], JobDocument] = OrderedDict()
        self.kept_bytes = 0

    def get(self, tenant_id: str, job_id: str) -> JobDocument:
        """The job as it is now; raises 404."""
        key, version = (tenant_id, job_id), self._jobs.version(tenant_id, job_id)
        days = self._policies.of(tenant_id).jobs
        with self._lock:
            found = self._kept.get(key)
            if found is not None and (found.version < version or found.days != days):
                found = None
            if found is not None:
                self._kept.move_to_end(key)
        if found is not None and (found.status != JobStatus.QUEUED or found.outlook == self._outlooks.of(job_id)):
            return found
        # The job may have changed since its version was asked for; what is rendered then is newer, which is fine.
        document = self.of(self._jobs.get(tenant_id, job_id))
        with self._lock:
            self._drop(key)
            self._kept[key] = document
            self.kept_bytes += len(document.body) + _OVERHEAD
            while self.kept_bytes > self._most and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))
        return document

    def of(self, row: Job) -> JobDocument:
        """The job as this row has it, with what it can expect: of the queue, or of the tenant's retention."""
        seen = self._outlooks.of(row.id) if row.status == JobStatus.QUEUED else None
        policy = self._policies.of(row.tenant_id)
        body = job_json(row, seen, policy.until("jobs", row.finished_at))
        etag = job_etag(row, seen, policy.jobs)
        return JobDocument(row.version, policy.jobs, row.status, is_terminal(row), etag, body, seen)

    def _drop(self, key: tuple[str, str]) -> None:
        dropped = self._kept.pop(key, None)
        if dropped is not None:
            self.kept_bytes -= len(dropped.body) + _OVERHEAD
