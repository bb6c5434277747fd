"""The one error type of the service; it knows nothing of HTTP frameworks.

Every failure that a client may see is an `AppError` (or a subclass). `app.http.problem` turns it into
`application/problem+json` (RFC 9457); workers store its members with the job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.remedies import USUAL


@dataclass(frozen=True)
class FieldError:
    """One invalid field of a request: where it stands (JSON pointer) and what is wrong with it."""

    pointer: str
    message: str


@dataclass
class AppError(Exception):
    """A failure with a stable `code`.

    `status` is the HTTP status that fits, `retryable` says whether the same request may succeed later, `remedy` what
    the user can do (by default what usually mends the code), `extra` are further public members of the problem
    document, `headers` go with the response.
    """

    code: str
    title: str
    status: int
    detail: str
    retryable: bool = False
    remedy: str | None = None
    stage: str | None = None
    node: str | None = None
    tensor: str | None = None
    errors: Sequence[FieldError] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.remedy is None:
            self.remedy = USUAL.get(self.code)
        super().__init__(f"{self.code}: {self.detail}")

    def members(self) -> dict[str, Any]:
        """The public members of the problem document, without `type`, `status` and `instance`."""
        out: dict[str, Any] = {"code": self.code, "title": self.title, "detail": self.detail}
        for name in ("stage", "node", "tensor", "remedy"):
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        if self.errors:
            out["errors"] = [{"pointer": e.pointer, "message": e.message} for e in self.errors]
        out.update(self.extra)
        return out


# What lists those that somebody may name.
_LISTED = {
    "model": "GET /v1/models",
    "dataset": "GET /v1/datasets",
    "data set": "GET /v1/datasets",
    "job": "GET /v1/jobs",
    "engine": "GET /v1/engines",
    "key": "GET /v1/keys",
    "webhook": "GET /v1/webhooks",
    "delivery": "GET /v1/deliveries",
    "tenant": "`anneal-admin tenants list`",
    "plan": "`anneal-admin plans list`",
}


def not_found(kind: str, resource_id: str) -> AppError:
    """404; also the answer for another tenant's resource, so that its existence does not leak."""
    listed = f"{_LISTED[kind]} lists those that there are." if kind in _LISTED else None
    return AppError("not_found", "Not found", 404, f"There is no {kind} {resource_id!r}.", remedy=listed)


def conflict(code: str, detail: str, remedy: str | None = None) -> AppError:
    return AppError(code, "Conflict", 409, detail, remedy=remedy)


def invalid_request(detail: str, errors: Sequence[FieldError] = (), remedy: str | None = None) -> AppError:
    return AppError("invalid_request", "The request is not valid", 422, detail, errors=errors, remedy=remedy)


def invalid_model(
    detail: str, *, node: str | None = None, tensor: str | None = None, remedy: str | None = None
) -> AppError:
    """422: the uploaded file is not a model this service takes."""
    return AppError("invalid_model", "The model is not valid", 422, detail, node=node, tensor=tensor, remedy=remedy)


def invalid_dataset(detail: str, *, tensor: str | None = None, remedy: str | None = None) -> AppError:
    """422: the uploaded file is not a data set this service takes."""
    return AppError("invalid_dataset", "The data set is not valid", 422, detail, tensor=tensor, remedy=remedy)


def storage_full() -> AppError:
    return AppError(
        "storage_full",
        "No space left",
        507,
        "The storage has no room for this file.",
        retryable=True,
        remedy="Free space on the storage, or ask the operator to.",
    )


def blob_corrupted(sha256: str) -> AppError:
    """The stored bytes are not those that their name says."""
    return AppError(
        "blob_corrupted",
        "Stored file damaged",
        503,
        f"The stored file {sha256} is damaged: its bytes have another digest.",
        retryable=True,
        remedy="Upload the same file again: it replaces the damaged one.",
        extra={"sha256": sha256},
    )


def storage_unavailable(detail: str) -> AppError:
    return AppError("storage_unavailable", "Storage unavailable", 503, detail, retryable=True)
