"""Removes what nothing needs any more: what has expired, old stage results, the files that they and deleted resources
leave behind, files of workers killed between storing a file and noting it, and rows that have had their time. Tallies
jobs that ended."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, TypeAlias

import structlog
from sqlalchemy import ColumnElement, delete, select, tuple_
from sqlalchemy.orm import InstrumentedAttribute

from app.blobs.content import ContentStore, blob_key, blob_prefix
from app.blobs.references import referenced
from app.blobs.removal import remove_unneeded
from app.blobs.retention import Retention
from app.capabilities.repository import StatisticsRepository
from app.db.accounts import AuditEvent, Tenant
from app.db.base import utcnow
from app.db.orm import Blob, BlobRemoval, IdempotencyKey, StageResult, Worker
from app.db.uow import Database
from app.db.webhooks import WebhookDelivery, WebhookEndpoint
from app.settings import Settings
from app.storage.base import StoredObject
from app.storage.local import LocalStore

log = structlog.get_logger(__name__)

_ROWS = 500  # that one pass removes from each table
_FILES = 200  # that one pass removes of each kind
_PAGE = 1000  # digests looked at together
_PAGES = 20  # looked at in one pass
_PASS_S = 1.0  # that one pass goes on with each kind of file, about
_BATCH = 10  # files removed in one transaction
_WORKER_DAYS = 7
_REMOVAL_DAYS = 1  # longer than anybody takes from seeing a file to noting it


@dataclass(frozen=True)
class _Batch:
    """Blobs of a tenant to which nothing referred a moment ago."""

    tenant_id: str
    digests: list[str]


# One step of a walk: blobs to remove, how many rows it has deleted, or None for a page that has been looked at.
_Walk: TypeAlias = Iterator[_Batch | int | None]


class Collector:
    """Any number of them may work at once, beside running jobs and uploads; each is used by one thread.

    A file is condemned while its lock (`lock_blob`) is held, after another look at what refers to it (`removal`):
    whoever stores the same content either has noted it by then, or takes the lock later and finds that its bytes were
    taken.

    `round_over`: the last pass found nothing left to do. Every blob has been looked at since the round began.
    """

    def __init__(self, db: Database, content: ContentStore, settings: Settings) -> None:
        self._db = db
        self._content = content
        self._settings = settings.collector
        self._retention = Retention(db, settings)
        # Where a walk stands is kept from pass to pass. Each round begins at any tenant, so that a collector that never
        # lives long does not look at the same tenants always.
        self._walks: dict[str, _Walk] = {}
        self.round_over = False

    def collect(self) -> dict[str, int]:
        """One pass, of bounded work: how much of each kind was removed. Raises what database and storage raise; what
        is left then is for the next pass."""
        if not self._walks:
            self._walks = {
                "expired": self._retention.walk(),
                "blobs": self._walk_recorded(),
                "orphans": self._walk_stored(),
            }
        settings = self._settings
        results = [StageResult.used_at < _before(settings.results_days)]
        if own := self._tenants_with_own("results"):
            results.append(StageResult.tenant_id.not_in(own))
        keys = [IdempotencyKey.created_at < _before(settings.idempotency_days)]
        workers = [Worker.last_seen_at < _before(_WORKER_DAYS)]
        removals = [BlobRemoval.removed_at < _before(_REMOVAL_DAYS)]
        deliveries = [WebhookDelivery.created_at < _before(settings.deliveries_days), WebhookDelivery.due_at.is_(None)]
        endpoints = [WebhookEndpoint.deleted_at < _before(settings.deliveries_days + 1)]  # their deliveries went before
        audited = [AuditEvent.created_at < _before(settings.audit_days)]
        old_removals = self._delete_rows([BlobRemoval.tenant_id, BlobRemoval.sha256], removals)
        # The database's own first: they do not depend on the storage.
        counts = {
            "tallied": self._tally(),
            "results": self._delete_rows([StageResult.tenant_id, StageResult.key], results),
            "idempotency_keys": self._delete_rows([IdempotencyKey.tenant_id, IdempotencyKey.key], keys),
            "audit_events": self._delete_rows([AuditEvent.id], audited),
            "workers": self._delete_rows([Worker.id], workers),
            "webhook_deliveries": self._delete_rows([WebhookDelivery.id], deliveries),
            "webhook_endpoints": self._delete_rows([WebhookEndpoint.id], endpoints),
        }
        more_rows = max(*counts.values(), old_removals) >= _ROWS
        counts |= {"temporary_files": self._remove_temporary(), "expired": 0, "blobs": 0, "orphans": 0}
        for kind in [*self._walks]:
            counts[kind] = self._advance(kind)
        self.round_over = not self._walks and not more_rows
        if any(counts.values()):
            log.info("collected", **counts)
        return counts

    @property
    def _cutoff(self) -> datetime:
        return utcnow() - timedelta(seconds=self._settings.grace_s)

    # Rows

    def _delete_rows(self, key: list[InstrumentedAttribute[Any]], old: list[ColumnElement[bool]]) -> int:
        """Delete some rows of a table by its primary key. Those that another transaction holds wait for a later pass;
        one that is used at this moment no longer meets the condition once it is locked."""
        table = key[0].class_
        with self._db.write() as uow:
            query = select(*key).where(*old).limit(_ROWS).with_for_update(skip_locked=True)
            found = [tuple(row) for row in uow.session.execute(query)]
            if found:
                uow.session.execute(
                    delete(table).where(tuple_(*key).in_(found)), execution_options={"synchronize_session": False}
                )
        return len(found)

    def _tally(self) -> int:
        with self._db.write() as uow:
            return StatisticsRepository(uow.session).tally(_ROWS)

    # Files

    def _remove_temporary(self) -> int:
        store = self._content.store
        return store.remove_stale(self._settings.grace_s) if isinstance(store, LocalStore) else 0

    def _advance(self, kind: str) -> int:
        """Go on with a walk, and forget it at its end: how much was removed."""
        walk, until = self._walks[kind], time.monotonic() + _PASS_S
        removed = pages = 0
        while removed < _FILES and pages < _PAGES and time.monotonic() < until:
            try:
                batch = next(walk)
            except StopIteration:
                del self._walks[kind]
                break
            except BaseException:
                self._walks.clear()  # this one has ended, without having seen all
                raise
            if isinstance(batch, _Batch):
                removed += self._remove(batch)
            else:
                pages, removed = pages + 1, removed + (batch or 0)
        return removed

    def _walk_recorded(self) -> _Walk:
        """Blobs whose row is older than the grace."""
        for tenant_id in self._tenants():
            after = ""
            while True:
                query = select(Blob.sha256).where(Blob.tenant_id == tenant_id, Blob.sha256 > after)
                query = query.where(Blob.created_at < self._cutoff).order_by(Blob.sha256).limit(_PAGE)
                with self._db.read() as session:
                    page = list(session.scalars(query))
                yield from self._unreferenced(tenant_id, page)
                if len(page) < _PAGE:
                    break
                after = page[-1]

    def _walk_stored(self) -> _Walk:
        """Files in storage older than the grace that have no row."""
        for tenant_id in self._tenants():
            yield None  # a listing costs something even where there is nothing
            for page in _pages(self._content.store.list(blob_prefix(tenant_id))):
                cutoff = self._cutoff
                old = {found.key.rpartition("/")[2]: found.key for found in page if found.modified_at < cutoff}
                # A key that is none of a blob is not ours.
                digests = [sha256 for sha256, key in old.items() if blob_key(tenant_id, sha256) == key]
                query = select(Blob.sha256).where(Blob.tenant_id == tenant_id, Blob.sha256.in_(digests))
                with self._db.read() as session:
                    recorded = set(session.scalars(query))
                yield from self._unreferenced(tenant_id, [sha256 for sha256 in digests if sha256 not in recorded])

    def _tenants_with_own(self, kind: str) -> list[str]:
        """Those whose retention says how long they keep this kind."""
        query = select(Tenant.id, Tenant.retention).where(Tenant.retention.is_not(None))
        with self._db.read() as session:
            return [tenant_id for tenant_id, own in session.execute(query) if kind in (own or {})]

    def _tenants(self) -> list[str]:
        with self._db.read() as session:
            tenants = list(session.scalars(select(Tenant.id)))
        random.shuffle(tenants)
        return tenants

    def _unreferenced(self, tenant_id: str, digests: list[str]) -> _Walk:
        """Those of a page that nothing refers to. No transaction is open while the walk rests."""
        yield None
        if digests:
            with self._db.read() as session:
                needed = referenced(session, tenant_id, digests)
            # In one order everywhere: locks taken in turn cannot wait for each other.
            unneeded = sorted(set(digests) - needed)
            for start in range(0, len(unneeded), _BATCH):
                yield _Batch(tenant_id, unneeded[start : start + _BATCH])

    def _remove(self, batch: _Batch) -> int:
        return remove_unneeded(self._db, self._content, batch.tenant_id, batch.digests, self._cutoff)


def _before(days: int) -> datetime:
    return utcnow() - timedelta(days=days)


def _pages(objects: Iterable[StoredObject]) -> Iterator[list[StoredObject]]:
    rest = iter(objects)
    while page := list(islice(rest, _PAGE)):
        yield page
