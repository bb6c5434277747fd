"""Failures of storage and disk, wherever they strike a job, as typed failures of infrastructure."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from app.domain.failures import infrastructure_failure
from app.errors import AppError
from app.storage.base import BlobNotFound

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def infrastructure_faults(stage: str | None = None) -> Iterator[None]:
    """Inside, `AppError` (storage away or full), `BlobNotFound` and `OSError` become a `StageFailure`."""
    try:
        yield
    except AppError as error:
        raise infrastructure_failure(error.code, error.detail, stage=stage, remedy=error.remedy) from error
    except BlobNotFound as error:
        detail = f"A stored file is gone ({error})."
        raise infrastructure_failure("blob_missing", detail, stage=stage, remedy="Upload it again.") from error
    except OSError as error:
        code = "storage_full" if error.errno in _FULL else "io_error"
        detail = f"{error.strerror or 'An input or output error'} on the worker's disk."
        remedy = "Free disk space on the worker." if code == "storage_full" else None
        raise infrastructure_failure(code, detail, stage=stage, remedy=remedy) from error
