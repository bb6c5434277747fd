"""`python -m app workers | drain | requeue`: what is said on the command line, done and answered."""

from __future__ import annotations

import argparse
import sys

from sqlalchemy import select

from app.capabilities.service import CapabilityService
from app.db.base import make_engine, utcnow
from app.db.orm import Job
from app.db.uow import Database
from app.errors import AppError
from app.jobs.operator import JobOperator
from app.jobs.schedule import RUNNING
from app.queue.producer import make_dispatch
from app.settings import Settings


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    """The exit status: 1 where there is nothing to do it to."""
    db = Database(make_engine(settings.database))
    try:
        if arguments.command == "workers":
            return _list(db, settings)
        if arguments.command == "drain":
            return _drain(CapabilityService(db, settings), arguments.worker, undo=arguments.undo)
        return _requeue(JobOperator(db, make_dispatch(settings), settings.worker), arguments)
    finally:
        db.close()


def _list(db: Database, settings: Settings) -> int:
    workers, now = CapabilityService(db, settings), utcnow()
    live = {worker.id for worker in workers.live()}
    held: dict[str | None, list[str]] = {}
    with db.read() as session:
        for owner, job_id in session.execute(select(Job.lease_owner, Job.id).where(Job.status == RUNNING)):
            held.setdefault(owner, []).append(job_id)
    for worker in workers.known():
        state = "live" if worker.id in live else "gone"
        if worker.draining_at is not None and worker.stopped_at is None:
            state = "draining"
        seen = f"seen {(now - worker.last_seen_at).total_seconds():.0f} s ago"
        sys.stdout.write("\t".join([worker.id, state, seen, *held.get(worker.id, ["no job"])]) + "\n")
    return 0


def _drain(workers: CapabilityService, worker_id: str, *, undo: bool) -> int:
    if not workers.drain(worker_id, draining=not undo):
        sys.stderr.write(f"No worker {worker_id!r} is known: `python -m app workers` lists them.\n")
        return 1
    sys.stderr.write("With its next heartbeat it takes jobs again.\n" if undo else "It takes no job any more.\n")
    return 0


def _requeue(operator: JobOperator, arguments: argparse.Namespace) -> int:
    try:
        if arguments.worker is None:
            operator.requeue(arguments.job)
            jobs = [arguments.job]
        else:
            jobs = [*operator.requeue_all(arguments.worker)]
    except AppError as error:
        sys.stderr.write(f"{error.detail}{f' {error.remedy}' if error.remedy else ''}\n")
        return 1
    sys.stdout.writelines(f"{job}\n" for job in jobs)
    if not jobs:
        sys.stderr.write("It holds no job.\n")
    return 0 if jobs else 1
