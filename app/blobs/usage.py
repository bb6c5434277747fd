"""What a tenant holds."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app.blobs.references import held
from app.db.orm import Blob


def bytes_of(session: Session, tenant_id: str) -> int:
    """Bytes in storage that the tenant's models, data sets, completed uploads, engines and reports need, each content
    counted once. Not what is only cached of its jobs' stages: the tenant cannot delete that, it goes by itself."""
    needed = held(tenant_id)
    query = select(func.sum(Blob.size_bytes)).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(needed))
    return int(session.scalar(query) or 0)


def size_held(session: Session, tenant_id: str, size_bytes: int | None) -> int:
    """`size_bytes` where content of just so many bytes is among these; None: of the largest of them. Else 0."""
    query = select(func.max(Blob.size_bytes)).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(held(tenant_id)))
    if size_bytes is not None:
        query = query.where(Blob.size_bytes == size_bytes)
    return int(session.scalar(query) or 0)


def stored_bytes_of(session: Session, tenant_id: str) -> int:
    """All the bytes that the storage keeps of the tenant, with what is cached and what is yet to be collected."""
    return int(session.scalar(select(func.sum(Blob.size_bytes)).where(Blob.tenant_id == tenant_id)) or 0)
