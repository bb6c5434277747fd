"""What can go wrong, typed. Every error carries the service's stable `code` and, where it has one, a `remedy`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx


class AnnealError(Exception):
    """A request or a job failed.

    `code` is stable and meant for programs; `detail` says what happened and `remedy` what to do about it; `status` is
    the HTTP status (None where there was no answer); `problem` is the whole problem document (RFC 9457) as received.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        status: int | None = None,
        remedy: str | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        self.code = code
        self.detail = detail
        self.status = status
        self.remedy = remedy
        self.problem: Mapping[str, Any] = problem or {}
        super().__init__(self._message())

    def _message(self) -> str:
        parts = [f"{self.code}: {self.detail}"]
        parts += [f"{name} {self.problem[name]!r}" for name in ("stage", "node", "tensor") if self.problem.get(name)]
        for error in self.problem.get("errors") or ():
            if isinstance(error, Mapping):
                parts.append(f"{error.get('pointer', '')} {error.get('message', '')}".strip())
        if self.remedy:
            parts.append(f"remedy: {self.remedy}")
        return "; ".join(parts)


class InvalidRequest(AnnealError):
    """The service does not take what was sent (400, 413, 415, 422); the same request will fail again."""


class Unauthorized(AnnealError):
    """No key, a wrong key, or a key that may not do this (401, 403)."""


class NotFound(AnnealError):
    """There is no such resource, or it belongs to someone else (404)."""


class Conflict(AnnealError):
    """The resource's state, or an earlier request with this Idempotency-Key, forbids it (409)."""


class Unavailable(AnnealError):
    """The service cannot do it now (429, 5xx); it stayed so for all retries."""


class ConnectionFailed(AnnealError):
    """No answer came, for all retries."""


class DigestMismatch(AnnealError):
    """The downloaded bytes are not the ones that the service stated."""


class UploadInterrupted(AnnealError):
    """A large upload did not finish. Calling again with `upload_id` sends only the parts that are missing."""

    def __init__(self, upload_id: str, cause: AnnealError) -> None:
        self.upload_id = upload_id
        super().__init__(
            "upload_interrupted",
            f"Upload {upload_id} did not finish: {cause.detail}",
            status=cause.status,
            remedy=f"Call again with upload_id={upload_id!r}; only the missing parts are sent.",
            problem=cause.problem,
        )


class JobFailed(AnnealError):
    """The job ended as `failed` or `cancelled`; `job` is its last state."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        error = job.get("error")
        error = error if isinstance(error, Mapping) else {}
        status = str(job.get("status"))
        super().__init__(
            str(error.get("code") or f"job_{status}"),
            str(error.get("detail") or error.get("message") or f"The job {status}."),
            remedy=error.get("remedy"),
            problem=error,
        )


class WaitTimeout(AnnealError):
    """The job had not ended in the time that the caller gave; it goes on. `job` is its state then."""

    def __init__(self, job: Mapping[str, Any], timeout_s: float) -> None:
        self.job = job
        super().__init__(
            "wait_timeout",
            f"Job {job.get('id')} is {job.get('status')} after {timeout_s:g} s.",
            remedy="Wait again: the job goes on. `cancel` ends it.",
        )


class EngineUnusable(AnnealError):
    """The engine cannot be loaded in this process, or not be called so; `remedy` says what is missing."""


class ConversionFailed(AnnealError):
    """What was given cannot be made into what the service takes, or does not compute the same any more."""


_BY_STATUS: dict[int, type[AnnealError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    413: InvalidRequest,
    415: InvalidRequest,
    422: InvalidRequest,
    429: Unavailable,
}


def error_from(response: httpx.Response) -> AnnealError:
    """The typed error of a read response with status ≥ 400, whether or not its body is a problem document."""
    try:
        body = response.json()
    except ValueError:
        body = None
    problem = body if isinstance(body, dict) else {}
    status = response.status_code
    kind = _BY_STATUS.get(status, Unavailable if status >= 500 else AnnealError)
    text = problem.get("detail") or problem.get("title") or response.text[:300].strip() or response.reason_phrase
    remedy = problem.get("remedy")
    return kind(
        str(problem.get("code") or f"http_{status}"),
        str(text),
        status=status,
        remedy=str(remedy) if remedy else None,
        problem=problem,
    )
