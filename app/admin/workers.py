"""`anneal-admin workers`: who takes jobs, and whom to leave without."""

from __future__ import annotations

import argparse

from sqlalchemy import select

from app.admin.desk import Desk
from app.capabilities.service import CapabilityService
from app.db.orm import Job
from app.jobs.schedule import RUNNING

HELP = "who takes jobs; a worker that is to end its own and take no other"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="those of the last 24 hours, and the jobs that they hold").set_defaults(run=show)
    drained = verbs.add_parser("drain", help="let one end its job and take no other, until it starts anew")
    drained.add_argument("worker", metavar="WORKER", help="its id, as `list` shows it")
    drained.add_argument("--undo", action="store_true", help="let it take jobs again")
    drained.set_defaults(run=drain)


def show(arguments: argparse.Namespace, desk: Desk) -> int:  # noqa: ARG001 (every verb is called so)
    workers = CapabilityService(desk.db, desk.settings)
    live = {worker.id for worker in workers.live()}
    held: dict[str | None, list[str]] = {}
    with desk.db.read() as session:
        for owner, job_id in session.execute(select(Job.lease_owner, Job.id).where(Job.status == RUNNING)):
            held.setdefault(owner, []).append(job_id)
    rows = []
    for worker in workers.known():
        state = "live" if worker.id in live else "gone"
        if worker.draining_at is not None and worker.stopped_at is None:
            state = "draining"
        jobs = held.get(worker.id, [])
        rows.append({"id": worker.id, "state": state, "last_seen_at": worker.last_seen_at, "jobs": jobs})
    desk.show(rows)
    return 0


def drain(arguments: argparse.Namespace, desk: Desk) -> int:
    if not CapabilityService(desk.db, desk.settings).drain(arguments.worker, draining=not arguments.undo):
        desk.complain(f"No worker {arguments.worker!r} is known: `anneal-admin workers list` has them.")
        return 1
    desk.say("With its next heartbeat it takes jobs again." if arguments.undo else "It takes no job any more.")
    return 0
