"""`anneal-admin jobs`: take a job from a worker that will not end it."""

from __future__ import annotations

import argparse

from app.admin.desk import Desk
from app.jobs.operator import JobOperator
from app.queue.producer import make_dispatch

HELP = "take jobs from workers that will not end them"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    again = verbs.add_parser("requeue", help="take a running job from its worker; end the pause of a queued one")
    which = again.add_mutually_exclusive_group(required=True)
    which.add_argument("job", metavar="JOB", nargs="?")
    which.add_argument("--worker", metavar="ID", help="all jobs that this worker holds: it is dead, or hangs")
    again.set_defaults(run=requeue)


def requeue(arguments: argparse.Namespace, desk: Desk) -> int:
    operator = JobOperator(desk.db, make_dispatch(desk.settings), desk.settings.worker)
    if arguments.worker is None:
        operator.requeue(arguments.job)
        jobs = [arguments.job]
    else:
        jobs = [*operator.requeue_all(arguments.worker)]
    if not jobs:
        desk.complain(f"{arguments.worker} holds no job.")
        return 1
    desk.show([{"job": job} for job in jobs])
    return 0
