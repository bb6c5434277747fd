"""How blobs go. Rows under their locks first, the bytes once that is committed (`ContentStore.condemn`, `remove`)."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

import structlog
from sqlalchemy import select

from app.blobs.content import Condemned, ContentStore
from app.blobs.references import forget_results, is_uploaded, lock_blob, lock_blobs, referenced
from app.db.orm import Blob
from app.db.uow import Database

log = structlog.get_logger(__name__)


def release(db: Database, content: ContentStore, tenant_id: str, digests: Collection[str]) -> None:
    """Remove blobs, rows and bytes, unless something of the tenant still needs them: for what was deleted just now."""
    condemned: list[Condemned] = []
    with db.write() as uow:
        unique = sorted(set(digests))
        lock_blobs(uow.session, tenant_id, unique)
        needed = referenced(uow.session, tenant_id, unique)
        condemned += [content.condemn(uow.session, tenant_id, d) for d in unique if d not in needed]
    content.remove(db, condemned)


def discard(db: Database, content: ContentStore, tenant_id: str, sha256: str) -> bool:
    """Forget the stage results that hold a damaged blob, and remove it, unless it was uploaded: then it is made again,
    also for the engine of an earlier job (until then there is none to download, rather than a wrong one). False where
    it was uploaded: only its owner has it, and replaces it by uploading it again."""
    condemned = []
    with db.write() as uow:
        lock_blob(uow.session, tenant_id, sha256)
        uploaded = is_uploaded(uow.session, tenant_id, sha256)
        if uploaded:
            content.forget(uow.session, tenant_id, sha256)
        else:
            forget_results(uow.session, tenant_id, sha256)
            condemned.append(content.condemn(uow.session, tenant_id, sha256))
    content.remove(db, condemned)
    log.warning("damaged_blob", tenant_id=tenant_id, sha256=sha256, discarded=not uploaded)
    return not uploaded


def remove_unneeded(
    db: Database, content: ContentStore, tenant_id: str, digests: Collection[str], cutoff: datetime
) -> int:
    """Remove those that nothing needs and that have neither a row nor bytes from after `cutoff`: how many that were.
    What was seen of them before is looked at again."""
    marks = content.marks(db, tenant_id, digests)
    # Stored again just now, perhaps, by someone who has yet to note it. Who does so after this look is told when he
    # comes to note it.
    stored = {sha256: content.modified_at(tenant_id, sha256) for sha256 in marks}
    old = [sha256 for sha256, modified_at in sorted(stored.items()) if modified_at is None or modified_at < cutoff]
    condemned: list[Condemned] = []
    with db.write() as uow:
        lock_blobs(uow.session, tenant_id, old)
        needed = referenced(uow.session, tenant_id, old)
        query = select(Blob.sha256).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(old))
        needed.update(uow.session.scalars(query.where(Blob.created_at >= cutoff)))
        for sha256 in old:
            if sha256 in needed or not content.unchanged(uow.session, tenant_id, sha256, marks[sha256]):
                continue
            if content.known(uow.session, tenant_id, sha256) or stored[sha256] is not None:
                condemned.append(content.condemn(uow.session, tenant_id, sha256))
    content.remove(db, condemned)
    return len(condemned)
