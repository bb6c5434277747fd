"""`anneal-admin workers`: who takes jobs, and whom to leave without."""

from __future__ import annotations

import argparse

from app.admin.desk import Desk
from app.capabilities.service import CapabilityService
from app.operators.service import workers

HELP = "who takes jobs; a worker that is to end its own and take no other"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="those of the last 24 hours, and the jobs that they hold").set_defaults(run=show)
    drained = verbs.add_parser("drain", help="let one end its job and take no other, until it starts anew")
    drained.add_argument("worker", metavar="WORKER", help="its id, as `list` shows it")
    drained.add_argument("--undo", action="store_true", help="let it take jobs again")
    drained.set_defaults(run=drain)


def show(arguments: argparse.Namespace, desk: Desk) -> int:  # noqa: ARG001 (every verb is called so)
    found = workers(desk.db, CapabilityService(desk.db, desk.settings))
    desk.show({"id": w.worker.id, "state": w.state, "last_seen_at": w.last_seen_at, "jobs": [*w.jobs]} for w in found)
    return 0


def drain(arguments: argparse.Namespace, desk: Desk) -> int:
    if not CapabilityService(desk.db, desk.settings).drain(arguments.worker, draining=not arguments.undo):
        desk.complain(f"No worker {arguments.worker!r} is known: `anneal-admin workers list` has them.")
        return 1
    desk.say("With its next heartbeat it takes jobs again." if arguments.undo else "It takes no job any more.")
    return 0
