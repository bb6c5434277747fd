"""`anneal-admin sessions`: browsers that people signed in with at the identity provider."""

from __future__ import annotations

import argparse

from app.admin.desk import Desk
from app.tenants.service import TenantService
from app.tenants.sessions import end_sessions, sessions

HELP = "who is signed in by the identity provider: list, end"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    found = verbs.add_parser("list", help="those that have not ended, newest first")
    found.add_argument("--tenant", help="name or id")
    found.add_argument("--limit", type=int, default=200, help="(%(default)s)")
    found.set_defaults(run=_list)
    end = verbs.add_parser("end", help="sign a person out everywhere, within two seconds")
    end.add_argument("subject", help="as `list` and audit rows have it, without `oidc:`")
    end.set_defaults(run=_end)


def _list(arguments: argparse.Namespace, desk: Desk) -> int:
    tenants = TenantService(desk.db, desk.settings.limits)
    tenant_id = None if arguments.tenant is None else tenants.get(arguments.tenant).id
    names = {tenant.id: tenant.name for tenant in tenants.all()}
    desk.show(
        {
            "subject": row.subject,
            "name": row.name,
            "tenant": names.get(row.tenant_id, row.tenant_id),
            "role": row.role,
            "created_at": row.created_at,
            "expires_at": row.expires_at,
        }
        for row in sessions(desk.db, tenant_id, limit=arguments.limit)
    )
    return 0


def _end(arguments: argparse.Namespace, desk: Desk) -> int:
    ended = end_sessions(desk.db, arguments.subject, actor=desk.actor)
    desk.say(f"Ended: {ended}.")
    return 0 if ended else 1
