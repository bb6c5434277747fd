"""What must be true after the soak: nothing lost, nothing twice, nothing stuck, nothing left over."""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select
from users import Accepted

from app.blobs.references import referenced
from app.db.base import make_engine
from app.db.orm import Engine, IdempotencyKey, Job, JobEvent, SourceModel
from app.db.uow import Database
from app.settings import Settings
from tests.cluster.cluster import Cluster

TERMINAL = ("succeeded", "failed", "cancelled")
_COLLECTED_WITHIN_S = 300.0
_SILENCE_S = 5.0


def open_database(cluster: Cluster) -> Database:
    return Database(make_engine(Settings(DATABASE_URL=cluster.environment["DATABASE_URL"]).database, _SILENCE_S))


def wait_for_the_end(db: Database, seconds: float) -> int:
    """Until every job has ended; answers how many have not."""
    deadline = time.monotonic() + seconds
    while True:
        with db.read() as session:
            query = select(func.count()).select_from(Job).where(Job.status.not_in(TERMINAL))
            left = session.scalar(query) or 0
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(1)


def check_jobs(db: Database, accepted: Accepted) -> dict[str, Any]:
    with db.read() as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        ends = Counter(
            event.job_id
            for event in session.scalars(select(JobEvent).where(JobEvent.type == "state"))
            if event.data.get("status") in TERMINAL
        )
        engines = Counter(session.scalars(select(Engine.job_id)))
        models = {m.id: m.sha256 for m in session.scalars(select(SourceModel))}
        keys = session.scalar(select(func.count()).select_from(IdempotencyKey)) or 0
    status = Counter(job.status for job in jobs.values())
    failures = Counter((job.error or {}).get("code", "?") for job in jobs.values() if job.status == "failed")
    return {
        "jobs": len(jobs),
        "status": dict(status),
        "failures": dict(failures),
        "failed_details": [(j.id, j.error) for j in jobs.values() if j.status == "failed"][:10],
        "lost_jobs": [j for j in accepted.jobs if j not in jobs],
        "lost_models": [m for m, digest in accepted.models.items() if models.get(m) != digest],
        "ended_twice": [j for j, n in ends.items() if n > 1],
        "never_ended": [j for j in jobs if ends[j] == 0],
        "engines_twice": [j for j, n in engines.items() if n > 1],
        "without_engine": [j for j, job in jobs.items() if job.status == "succeeded" and engines[j] != 1],
        "same_key_twice": len(accepted.jobs) - len(set(accepted.jobs.values())),
        "idempotency_keys": keys,
    }


def check_stages(cluster: Cluster, db: Database) -> dict[str, Any]:
    """How often a stage was done over. Each start of a stage's work leaves an event; what a job had to do, and who did
    it, stands in its list of stages, by key. A job may repeat one stage for every time that it was taken from a worker
    or given back, and one for every time that a stage's process was lost, which the workers' logs tell."""
    with db.read() as session:
        jobs = {row.id: row.stages for row in session.execute(select(Job.id, Job.stages, Job.status)) if row.stages}
        begun, taken = Counter[str](), Counter[str]()
        story: dict[str, list[str]] = {}
        told = select(JobEvent).where(JobEvent.type.in_(("stage", "state"))).order_by(JobEvent.job_id, JobEvent.seq)
        for event in session.scalars(told):
            data, lines = event.data, story.setdefault(event.job_id, [])
            line = " ".join(str(data.get(k) or "") for k in ("stage", "candidate", "status", "reason", "worker"))
            if event.type == "stage" and data.get("status") == "running":
                # Told twice in a row: written anew by a worker that did not learn whether it had been.
                begun[event.job_id] += not (lines and lines[-1].endswith(line))
            elif event.type == "state" and data.get("status") == "queued" and data.get("reason"):
                taken[event.job_id] += 1
            lines.append(f"{event.created_at:%H:%M:%S.%f} {line}")
    tried = Counter[str]()
    for worker in cluster.workers:
        for line in (cluster.folder / worker.name / "log").read_text(errors="replace").splitlines():
            if '"stage_tried_again"' in line:
                with suppress(ValueError):
                    tried[str(json.loads(line).get("job_id"))] += 1
    repeated = {job: begun[job] - len({stage["key"] for stage in stages}) for job, stages in jobs.items()}
    more = {
        job: {"repeated": count, "taken": taken[job], "tried_again": tried[job], "story": story[job]}
        for job, count in repeated.items()
        if count > taken[job]
    }
    return {
        "stages_begun": begun.total(),
        "repeated": sum(max(count, 0) for count in repeated.values()),
        "tried_again": tried.total(),
        "taken": taken.total(),
        "more_than_one_a_fault": more,
    }


def check_storage(cluster: Cluster, db: Database) -> dict[str, Any]:
    """Waits for the collectors, then looks for blobs that nothing refers to and for uploads that nobody will end."""
    deadline = time.monotonic() + _COLLECTED_WITHIN_S
    while True:
        orphans, stored = _orphans(cluster, db)
        parts = _open_uploads(cluster)
        if (not orphans and not parts) or time.monotonic() > deadline:
            sizes = {key: stored[key] for key in orphans}
            return {"blobs": len(stored), "orphans": sorted(sizes), "bytes": sum(sizes.values()), "open_uploads": parts}
        time.sleep(5)


def _orphans(cluster: Cluster, db: Database) -> tuple[list[str], dict[str, int]]:
    client: Any = cluster.client_of_s3()
    stored: dict[str, int] = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=cluster.bucket):
        stored |= {o["Key"]: o["Size"] for o in page.get("Contents", ())}
    by_tenant: dict[str, dict[str, str]] = {}
    orphans = []
    for key in stored:
        tenant_id, digest = tenant_and_digest(key)
        if digest is None:
            orphans.append(key)
        else:
            by_tenant.setdefault(tenant_id, {})[digest] = key
    with db.read() as session:
        for tenant_id, keys in by_tenant.items():
            wanted = referenced(session, tenant_id, keys)
            orphans += [key for digest, key in keys.items() if digest not in wanted]
    return orphans, stored


def tenant_and_digest(key: str) -> tuple[str, str | None]:
    """Of a blob's key; no digest where it is something else (an upload that was not ended)."""
    parts = Path(key).parts
    tenant = next((p for p in parts if p.startswith("tnt_")), "")
    digest = parts[-1] if len(parts[-1]) == 64 else None
    return tenant, digest


def _open_uploads(cluster: Cluster) -> list[str]:
    client: Any = cluster.client_of_s3()
    return [u["Key"] for u in client.list_multipart_uploads(Bucket=cluster.bucket).get("Uploads", ())]


def check_leftovers(cluster: Cluster) -> dict[str, Any]:
    """After everything was stopped: processes, work folders, temporary files."""
    files = [
        str(path.relative_to(cluster.folder))
        for managed in [*cluster.apis, *cluster.workers]
        for part in ("work", "tmp")
        if (cluster.folder / managed.name / part).is_dir()
        for path in (cluster.folder / managed.name / part).iterdir()
    ]
    return {"processes": cluster.left_over(), "files": files}


def healthy(cluster: Cluster) -> bool:
    """Every API serves, and nothing is missing, a live worker neither."""
    return all(httpx.get(f"{url}/readyz", timeout=10).json()["status"] == "ready" for url in cluster.urls)
