"""`anneal-admin retention`: after how many days what a tenant has expires."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from sqlalchemy import select

from app.admin.desk import Desk
from app.blobs.retention import KINDS, LONGEST_DAYS, Policy, policy_of
from app.db.accounts import Tenant
from app.operators.service import DEFAULT, NEVER, set_retention

HELP = "how long tenants keep what they have"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    shown = verbs.add_parser("show", help="days until each kind expires, of every tenant or one")
    shown.add_argument("tenant", nargs="?", metavar="TENANT", help="its name or id")
    shown.set_defaults(run=show)
    changed = verbs.add_parser("set", help="change a tenant's own: jobs=30 models=never events=default")
    changed.add_argument("tenant", metavar="TENANT", help="its name or id")
    changed.add_argument("days", nargs="+", metavar="KIND=DAYS", type=_days, help=f"of {', '.join(KINDS)}")
    changed.set_defaults(run=change)


def _days(text: str) -> tuple[str, int | str]:
    kind, _, value = text.partition("=")
    if kind in KINDS and value in (NEVER, DEFAULT):
        return kind, value
    if kind in KINDS and value.isdecimal() and 1 <= int(value[:9]) <= LONGEST_DAYS:
        return kind, int(value)
    raise argparse.ArgumentTypeError(
        f"{text!r} is not KIND=DAYS: {', '.join(KINDS)}; 1 to {LONGEST_DAYS}, never, default"
    )


def show(arguments: argparse.Namespace, desk: Desk) -> int:
    query = select(Tenant.id, Tenant.name, Tenant.retention).order_by(Tenant.id)
    if arguments.tenant is not None:
        query = query.where((Tenant.id == arguments.tenant) | (Tenant.name == arguments.tenant))
    with desk.db.read() as session:
        found = session.execute(query).all()
    if not found and arguments.tenant is not None:
        desk.complain(f"There is no tenant {arguments.tenant!r}.")
        return 1
    desk.show([_row(name, tenant, policy_of(desk.settings, own)) for tenant, name, own in found])
    return 0


def change(arguments: argparse.Namespace, desk: Desk) -> int:
    """What is shorter now applies to what is there already, from the collector's next round on."""
    set_retention(desk.db, arguments.tenant, dict(arguments.days), actor=desk.actor)
    return show(arguments, desk)


def _row(name: str, tenant_id: str, policy: Policy) -> dict[str, Any]:
    return {"tenant": name, "id": tenant_id, **{k: NEVER if v is None else v for k, v in asdict(policy).items()}}
