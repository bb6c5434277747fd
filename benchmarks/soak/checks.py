"""What must be true after the soak: nothing lost, nothing twice, nothing stuck, nothing left over."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import func, select

from app.blobs.references import referenced
from app.db.base import make_engine
from app.db.orm import Engine, IdempotencyKey, Job, JobEvent, SourceModel
from app.db.uow import Database
from app.settings import Settings
from benchmarks.soak.users import Accepted
from tests.cluster.cluster import Cluster

TERMINAL = ("succeeded", "failed", "cancelled")
_COLLECTED_WITHIN_S = 300.0
_SILENCE_S = 5.0
_FAILED = ("", "failed")
_ONCE = ("export", "simplify", "quantize", "build")


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
    """How often a stage was done over, by the events: a stage's work leaves one where it begins and where it ends. A
    job may lose the work of one stage for every time that it was taken from a worker or given back, and what was
    finished is not made again (of the stages that a candidate goes through once; the others have more than one call,
    and a search that went on elsewhere may go another way). In one attempt, a stage whose process was lost is tried
    again: the workers' logs tell."""
    begun, cut_off, taken, again = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    story: dict[str, list[str]] = {}
    with db.read() as session:
        told = select(JobEvent).where(JobEvent.type.in_(("stage", "state"))).order_by(JobEvent.job_id, JobEvent.seq)
        runs: dict[str, tuple[str, str] | None] = {}  # the stage and candidate whose work has begun, by job
        made = Counter[tuple[str, str, str]]()
        for event in session.scalars(told):
            job, data = event.job_id, event.data
            what = (str(data.get("stage") or ""), str(data.get("candidate") or ""))
            line = " ".join(str(data.get(k) or "") for k in ("stage", "candidate", "status", "reason", "worker"))
            story.setdefault(job, []).append(f"{event.created_at:%H:%M:%S.%f} {line}")
            if event.type == "stage" and data.get("status") == "running":
                if runs.get(job) != what:  # else told anew by who did not learn whether it had been
                    begun[job] += 1
                runs[job] = what
                continue
            given_back = event.type == "state" and data.get("status") == "queued" and bool(data.get("reason"))
            mine, ended = runs.get(job) == what, data.get("status")
            if mine and ended == "succeeded" and what[0] in _ONCE:
                made[job, *what] += 1
            left = event.type == "stage" and not mine and runs.get(job) != _FAILED
            cut_off[job] += runs.get(job) is not None and (given_back or left)
            taken[job] += given_back
            # A failure is the model's, or else the job is given back now, and that work is lost.
            runs[job] = _FAILED if mine and ended == "failed" else None
    for (job, *_), count in made.items():
        again[job] += count - 1
    lost = {job: cut_off[job] + again[job] for job in story}
    return {
        "begun": begun.total(),
        "done_again": sum(lost.values()),
        "taken": taken.total(),
        "tried_again": _tried_again(cluster),
        "more_than_one_a_fault": {
            job: {"done_again": count, "taken": taken[job], "story": story[job]}
            for job, count in lost.items()
            if count > taken[job]
        },
    }


def _tried_again(cluster: Cluster) -> int:
    logs = (cluster.folder / worker.name / "log" for worker in cluster.workers)
    return sum(log.read_text(errors="replace").count('"stage_tried_again"') for log in logs)


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
