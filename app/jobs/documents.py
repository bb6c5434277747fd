"""Jobs as clients poll them. Most polls find nothing new, so a poll asks the database for the version only, and a
document is rendered once per version: the version grows with every change that a client can see. What a queued job can
expect changes without; its document is rendered once for each of that, too."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from app.db.orm import Job
from app.domain.job_state import JobStatus
from app.jobs.outlook import Outlook, Outlooks
from app.jobs.schemas import is_terminal, job_etag, job_json
from app.jobs.service import JobService

_KEPT_BYTES = 32 << 20
_OVERHEAD = 500  # of one document beside its body


@dataclass(frozen=True)
class JobDocument:
    """A rendered job: JSON, strong ETag."""

    version: int
    status: str
    terminal: bool
    etag: str
    body: bytes
    outlook: Outlook | None = None


class JobDocuments:
    """Keeps the newest document of the jobs last asked for, up to so many bytes in all. Threads may share it."""

    def __init__(self, jobs: JobService, outlooks: Outlooks, kept_bytes: int = _KEPT_BYTES) -> None:
        self._jobs, self._outlooks = jobs, outlooks
        self._most = kept_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], JobDocument] = OrderedDict()
        self.kept_bytes = 0

    def get(self, tenant_id: str, job_id: str) -> JobDocument:
        """The job as it is now; raises 404."""
        key, version = (tenant_id, job_id), self._jobs.version(tenant_id, job_id)
        with self._lock:
            found = self._kept.get(key)
            if found is not None and found.version >= version:
                self._kept.move_to_end(key)
                if found.status != JobStatus.QUEUED:
                    return found
        if found is not None and found.version >= version and self._outlooks.of(job_id) == found.outlook:
            return found
        # The job may have changed since its version was asked for; what is rendered then is newer, which is fine.
        row = self._jobs.get(tenant_id, job_id)
        seen = self._outlook(row)
        document = JobDocument(
            row.version, row.status, is_terminal(row), job_etag(row, seen), job_json(row, seen), seen
        )
        with self._lock:
            self._drop(key)
            self._kept[key] = document
            self.kept_bytes += len(document.body) + _OVERHEAD
            while self.kept_bytes > self._most and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))
        return document

    def render(self, row: Job) -> bytes:
        """A row as JSON, with what it can expect."""
        return job_json(row, self._outlook(row))

    def _outlook(self, row: Job) -> Outlook | None:
        return self._outlooks.of(row.id) if row.status == JobStatus.QUEUED else None

    def _drop(self, key: tuple[str, str]) -> None:
        dropped = self._kept.pop(key, None)
        if dropped is not None:
            self.kept_bytes -= len(dropped.body) + _OVERHEAD
