"""All SQL on upload sessions."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.orm import Session

from app.db.orm import Upload
from app.domain.upload_state import UploadState

_LOST = (UploadState.OPENING, UploadState.OPEN, UploadState.COMPLETING, UploadState.COMPLETED)
_OWED = (UploadState.ABORTING, UploadState.COMPLETED, UploadState.CONSUMED)


class UploadRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def get(self, tenant_id: str, upload_id: str, *, lock: bool = False) -> Upload | None:
        query = select(Upload).where(Upload.id == upload_id, Upload.tenant_id == tenant_id)
        return self.session.scalar(query.with_for_update() if lock else query)

    def take(self, upload_id: str, now: datetime, lease: timedelta) -> bool:
        """To `completing`, or on with a completion that was left; False where somebody else has it."""
        left = and_(Upload.status == UploadState.COMPLETING, Upload.lease_expires_at < now)
        free = or_(Upload.status == UploadState.OPEN, left)
        return self._change(upload_id, free, status=UploadState.COMPLETING, lease_expires_at=now + lease)

    def renew(self, upload_id: str, until: datetime) -> bool:
        return self._change(upload_id, Upload.status == UploadState.COMPLETING, lease_expires_at=until)

    def change(self, upload_id: str, source: UploadState, **values: Any) -> bool:
        """Change columns of a session that is in this state; False where it is not."""
        return self._change(upload_id, Upload.status == source, **values)

    def cleared(self, upload_id: str) -> None:
        """The storage owes nothing any more."""
        aborted = {"status": UploadState.ABORTED, "lease_expires_at": None}
        if not self.change(upload_id, UploadState.ABORTING, **aborted):
            self._change(upload_id, Upload.status.in_(_OWED), lease_expires_at=None)

    def _change(self, upload_id: str, condition: Any, **values: Any) -> bool:
        statement = update(Upload).where(Upload.id == upload_id, condition).values(**values).returning(Upload.id)
        return self.session.scalar(statement, execution_options={"synchronize_session": False}) is not None

    def expired(self, now: datetime, limit: int) -> list[Upload]:
        """Sessions past their time that still hold bytes, but for those that somebody completes at this moment."""
        busy = and_(Upload.status == UploadState.COMPLETING, Upload.lease_expires_at >= now)
        query = select(Upload).where(Upload.expires_at < now, Upload.status.in_(_LOST), ~busy)
        return list(self.session.scalars(query.order_by(Upload.expires_at).limit(limit)))

    def owed(self, now: datetime, limit: int) -> list[Upload]:
        """Sessions that have ended and whose bytes the storage was, it seems, not asked to forget."""
        query = select(Upload).where(Upload.status.in_(_OWED), Upload.lease_expires_at < now)
        return list(self.session.scalars(query.order_by(Upload.lease_expires_at).limit(limit)))

    def postpone(self, upload: Upload, until: datetime) -> bool:
        """Keep others from what is `owed`; False where somebody else has."""
        same = and_(Upload.status.in_(_OWED), Upload.lease_expires_at == upload.lease_expires_at)
        return self._change(upload.id, same, lease_expires_at=until)

    def purge(self, before: datetime) -> None:
        """Drop the rows of sessions that ended long ago."""
        ended = Upload.status.in_((UploadState.CONSUMED, UploadState.ABORTED))
        nothing_owed = Upload.lease_expires_at.is_(None)
        self.session.execute(delete(Upload).where(Upload.expires_at < before, ended, nothing_owed))
