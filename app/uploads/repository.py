"""All SQL on upload sessions."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from app.db.orm import Upload

OPEN, COMPLETED, CONSUMED, ABORTED = "open", "completed", "consumed", "aborted"


class UploadRepository:
    def __init__(self, session: Session) -> None:
        self.session = session

    def get(self, tenant_id: str, upload_id: str, *, lock: bool = False) -> Upload | None:
        query = select(Upload).where(Upload.id == upload_id, Upload.tenant_id == tenant_id)
        return self.session.scalar(query.with_for_update() if lock else query)

    def expired(self, now: datetime, limit: int) -> list[Upload]:
        """Sessions past their time that still hold bytes."""
        query = select(Upload).where(Upload.expires_at < now, Upload.status.in_((OPEN, COMPLETED)))
        return list(self.session.scalars(query.order_by(Upload.expires_at).limit(limit)))

    def purge(self, before: datetime) -> None:
        """Drop the rows of sessions that ended long ago."""
        ended = Upload.status.in_((CONSUMED, ABORTED))
        self.session.execute(delete(Upload).where(Upload.expires_at < before, ended))
