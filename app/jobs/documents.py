"""Jobs as clients poll them. Most polls find nothing new, so a poll asks the database for the version only, and a
document is rendered once per version: the version grows with every change that a client can see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from app.jobs.schemas import is_terminal, job_etag, job_json
from app.jobs.service import JobService

_KEPT = 1024


@dataclass(frozen=True)
class JobDocument:
    """A rendered job: JSON, strong ETag."""

    version: int
    terminal: bool
    etag: str
    body: bytes


class JobDocuments:
    """Threads may share it."""

    def __init__(self, jobs: JobService) -> None:
        self._version: Callable[[str, str], int] = jobs.version

        @lru_cache(maxsize=_KEPT)
        def render(tenant_id: str, job_id: str, _version: int) -> JobDocument:
            # The job may have changed since its version was asked for; what is rendered then is newer, which is fine.
            row = jobs.get(tenant_id, job_id)
            return JobDocument(row.version, is_terminal(row), job_etag(row), job_json(row))

        self._render = render

    def get(self, tenant_id: str, job_id: str) -> JobDocument:
        """The job as it is now; raises 404."""
        return self._render(tenant_id, job_id, self._version(tenant_id, job_id))
