"""`anneal-admin doctor`: whether rows and blobs agree, what is stuck, what machines lack to keep untrusted models
apart; mends what can be mended safely."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from itertools import chain
from typing import Any

from sqlalchemy import and_, or_, select

from app.admin.desk import Desk
from app.blobs.checkup import REMEDIES, Checkup, Finding
from app.blobs.content import ContentStore
from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.orm import Job, Upload, Worker
from app.domain.job_state import JobStatus
from app.domain.upload_state import UploadState
from app.errors import AppError
from app.jobs.sweep import Sweeper
from app.storage.factory import make_store
from app.tenants.service import TenantService
from app.uploads.service import UploadService

HELP = "compare rows with blobs, look for what is stuck, try the identity provider"
_LATE = timedelta(minutes=5)  # after which somebody should have gone on with it
_MOST = 1000  # of what is stuck, in one run
_EXAMPLES = 20
_NEEDED_BY = 3
_LEASE, _UPLOAD = "expired_lease", "stuck_upload"
_PROVIDER = "identity_provider"
_STUCK = {
    _PROVIDER: "Compare the OIDC_… variables with what the provider publishes, and this machine's way to it.",
    _LEASE: "Start a worker: each queues again the jobs of those that died. --mend does it now.",
    _UPLOAD: "Start a worker: each goes on with uploads that were left. --mend does it now.",
}
_Row = dict[str, Any]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", metavar="ID", help="of this tenant only")
    parser.add_argument("--hash", action="store_true", help="read every blob to its end, too: finds damaged ones")
    parser.add_argument("--mend", action="store_true", help="mend what can be mended without losing anything")
    parser.add_argument(
        "--limit", type=int, default=_EXAMPLES, metavar="N", help=f"show at most so many of a kind ({_EXAMPLES})"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, desk: Desk) -> int:
    """0: nothing is wrong, or all that was is mended; 1: something is."""
    content = ContentStore(make_store(desk.settings))
    grace_s = desk.settings.collector.grace_s
    checkup = Checkup(desk.db, content, grace_s, hashed=arguments.hash, mend=arguments.mend)
    found, left = Counter[str](), Counter[str]()
    shown: dict[str, list[_Row]] = defaultdict(list)
    stuck = _stuck(desk, content, arguments.tenant, mend=arguments.mend)
    provider, troubles = _provider(desk) if desk.settings.oidc.issuer else (None, [])
    for row in chain(troubles, stuck, map(_row, checkup.run(arguments.tenant))):
        kind = row["problem"]
        found[kind] += 1
        left[kind] += not row["mended"]
        if len(shown[kind]) < arguments.limit:
            shown[kind].append(row)
    if found:
        desk.show(chain.from_iterable(shown.values()))
        remedies: dict[str, str] = {**_STUCK, **{str(trouble): told for trouble, told in REMEDIES.items()}}
        desk.show(
            {"problem": kind, "found": found[kind], "left": left[kind], "remedy": remedies[kind]}
            for kind in sorted(found)
        )
    if provider is not None:
        desk.show([{"looked_at": "identity provider", **provider}])
    live = CapabilityService(desk.db, desk.settings).live()
    if live:
        desk.show({"looked_at": "isolation", "worker": worker.id, "missing": _open(worker)} for worker in live)
    desk.show([{"looked_at": "blobs", **asdict(checkup.looked)}])
    return 1 if left.total() else 0


def _open(worker: Worker) -> str | None:
    """What this worker's machine lacks to keep untrusted models apart."""
    return "; ".join((worker.hardware.get("isolation") or {}).get("missing", ())) or None


def _row(finding: Finding) -> _Row:
    more = len(finding.needed_by) - _NEEDED_BY
    by = [*finding.needed_by[:_NEEDED_BY], *([f"{more} more"] if more > 0 else [])]
    return {
        "problem": str(finding.trouble),
        "tenant": finding.tenant_id,
        "what": finding.sha256,
        "bytes": finding.size_bytes,
        "needed_by": ", ".join(by) or None,
        "mended": finding.mended,
    }


def _provider(desk: Desk) -> tuple[_Row, list[_Row]]:
    """What was looked at of the identity provider, and what is wrong with it."""
    oidc = desk.settings.oidc
    tenants = {tenant.name for tenant in TenantService(desk.db, desk.settings.limits).all()}
    try:
        from app.oidc.checkup import examined

        looked, troubles = examined(oidc, tenants)
    except ImportError as error:
        looked, troubles = {"issuer": oidc.issuer, "keys": 0}, [f"the extra `oidc` is not installed here: {error}"]
    row = {"problem": _PROVIDER, "tenant": None, "what": oidc.issuer, "bytes": None, "mended": None}
    return looked, [{**row, "needed_by": trouble} for trouble in troubles]


def _stuck(desk: Desk, content: ContentStore, tenant_id: str | None, *, mend: bool) -> Iterator[_Row]:
    """Jobs whose lease is long over, uploads that nobody goes on with."""
    before = [*_late(desk, tenant_id)]
    if mend and any(kind == _LEASE for kind, *_ in before):
        # Nothing is sent: workers look for what is queued and was not sent.
        Sweeper(desk.db, lambda _job: False, desk.settings.worker).sweep()
    if mend and any(kind == _UPLOAD for kind, *_ in before):
        _go_on(desk, content, [(tenant, upload) for kind, tenant, upload in before if kind == _UPLOAD])
    still = {what for _, _, what in _late(desk, tenant_id)} if mend else set()
    for kind, tenant, what in before:
        mended = what not in still if mend else None
        yield {"problem": kind, "tenant": tenant, "what": what, "bytes": None, "needed_by": None, "mended": mended}


def _late(desk: Desk, tenant_id: str | None) -> Iterator[tuple[str, str, str]]:
    before = utcnow() - _LATE
    left = and_(Upload.lease_expires_at < before, Upload.status != UploadState.ABORTED)
    unended = Upload.status.in_((UploadState.OPENING, UploadState.OPEN, UploadState.COMPLETING, UploadState.COMPLETED))
    over = and_(Upload.expires_at < before, unended)
    queries = {
        _LEASE: select(Job.tenant_id, Job.id).where(
            Job.status == JobStatus.RUNNING.value, Job.lease_expires_at < before
        ),
        _UPLOAD: select(Upload.tenant_id, Upload.id).where(or_(left, over)),
    }
    for kind, query in queries.items():
        mine = [(Job if kind == _LEASE else Upload).tenant_id == tenant_id] if tenant_id is not None else []
        with desk.db.read() as session:
            rows = session.execute(query.where(*mine).limit(_MOST)).all()
        for tenant, what in rows:
            yield kind, tenant, what


def _go_on(desk: Desk, content: ContentStore, left: list[tuple[str, str]]) -> None:
    uploads = UploadService(desk.db, content, desk.settings)
    uploads.expire_uploads()
    for tenant_id, upload_id in left:
        with suppress(AppError):  # it ends as its client is told
            if uploads.get(tenant_id, upload_id).status == UploadState.COMPLETING:
                uploads.complete(tenant_id, upload_id)
