"""The states of an upload session."""

from __future__ import annotations

from enum import StrEnum


class UploadState(StrEnum):
    """`opening` and `aborting` are the same to clients as what follows: in them the storage has yet to do its part."""

    OPENING = "opening"
    OPEN = "open"
    COMPLETING = "completing"  # somebody joins the parts, while the lease lasts; after that anybody may go on
    COMPLETED = "completed"
    CONSUMED = "consumed"  # it has become a model or a data set
    ABORTING = "aborting"
    ABORTED = "aborted"

    @property
    def public(self) -> UploadState:
        """What clients are told."""
        return _PUBLIC.get(self, self)


_PUBLIC = {UploadState.OPENING: UploadState.OPEN, UploadState.ABORTING: UploadState.ABORTED}

DONE = frozenset({UploadState.COMPLETED, UploadState.CONSUMED})
ENDED = frozenset({UploadState.ABORTING, UploadState.ABORTED})
