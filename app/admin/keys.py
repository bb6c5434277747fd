"""`anneal-admin keys`: those of any tenant."""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from typing import Any

from app.admin.desk import Desk
from app.db.accounts import ApiKey
from app.domain.roles import Role
from app.library import clean_name
from app.tenants.callers import hash_key, utterable
from app.tenants.keys import LONGEST_LIFE, USUAL_GRACE, KeyService, MadeKey
from app.tenants.service import TenantService

HELP = "API keys: make, list, replace, revoke"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    create = verbs.add_parser("create", help="make a key and print it, once")
    create.add_argument("--tenant", required=True, help="the tenant's name or id; see `tenants create`")
    create.add_argument("--name", default="default", help="what the key is for")
    create.add_argument(
        "--role", type=Role, choices=list(Role), default=Role.ADMIN, help="what it may do (%(default)s)"
    )
    create.add_argument("--days", type=int, help="how long; without, it does not end by itself")
    create.set_defaults(run=_create)
    found = verbs.add_parser("list", help="the keys of a tenant, or of all, newest first")
    found.add_argument("--tenant", help="the tenant's name or id")
    found.add_argument("--limit", type=int, default=200)
    found.set_defaults(run=_list)
    revoke = verbs.add_parser("revoke", help="end a key within two seconds, with the browsers that signed in with it")
    revoke.add_argument("key", help="its id, or the key itself")
    revoke.set_defaults(run=_revoke)
    rotate = verbs.add_parser("rotate", help="make a key in the place of another one, which goes on for the grace")
    rotate.add_argument("key", help="the id of the old one")
    hours = USUAL_GRACE.total_seconds() / 3600
    rotate.add_argument("--grace-hours", type=float, default=hours, help="(%(default)g)")
    rotate.set_defaults(run=_rotate)


def _create(arguments: argparse.Namespace, desk: Desk) -> int:
    life = None
    if arguments.days is not None:
        if not 1 <= arguments.days <= LONGEST_LIFE.days:
            desk.complain(f"--days: 1 to {LONGEST_LIFE.days}")
            return 2
        life = timedelta(days=arguments.days)
    tenant = TenantService(desk.db, desk.settings.limits).get(arguments.tenant)
    name = clean_name(arguments.name, "")
    return _told(desk, KeyService(desk.db).make(tenant.id, name, arguments.role, life, actor=desk.actor))


def _list(arguments: argparse.Namespace, desk: Desk) -> int:
    tenants = TenantService(desk.db, desk.settings.limits)
    tenant_id = None if arguments.tenant is None else tenants.get(arguments.tenant).id
    names = {tenant.id: tenant.name for tenant in tenants.all()}
    rows = KeyService(desk.db).page(tenant_id, limit=arguments.limit)
    desk.show([_row(row, names.get(row.tenant_id, row.tenant_id)) for row in rows])
    return 0


def _revoke(arguments: argparse.Namespace, desk: Desk) -> int:
    if not utterable(arguments.key):
        desk.complain("This is no key, nor the id of one.")
        return 1
    row = KeyService(desk.db).revoke(None, arguments.key, actor=desk.actor, key_sha256=hash_key(arguments.key))
    desk.say(f"Revoked: {row.id}.")
    return 0


def _rotate(arguments: argparse.Namespace, desk: Desk) -> int:
    grace = timedelta(hours=max(arguments.grace_hours, 0))
    return _told(desk, KeyService(desk.db).rotate(None, arguments.key, grace, actor=desk.actor))


def _told(desk: Desk, made: MadeKey) -> int:
    sys.stdout.write(made.secret + "\n")
    desk.say(f"Its id: {made.row.id}. It is not shown again.")
    return 0


def _row(row: ApiKey, tenant: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "tenant": tenant,
        "name": row.name,
        "role": row.role,
        "created_at": row.created_at,
        "last_used_at": row.last_used_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }
