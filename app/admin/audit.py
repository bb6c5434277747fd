"""`anneal-admin audit`: what was done, in any tenant's name."""

from __future__ import annotations

import argparse

from app.admin.desk import Desk
from app.tenants.service import TenantService

HELP = "what was done, by whom, newest first"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tenant", help="name or id; without, all, and sign-ins with what is no key")
    parser.add_argument("--action", help="key.create, job.submit, session.refuse …")
    parser.add_argument("--limit", type=int, default=50, help="(%(default)s)")
    parser.add_argument("--before", metavar="ID", help="go on after this row")
    parser.set_defaults(run=_audit)


def _audit(arguments: argparse.Namespace, desk: Desk) -> int:
    service = TenantService(desk.db, desk.settings.limits)
    names = {tenant.id: tenant.name for tenant in service.all()}
    tenant_id = None if arguments.tenant is None else service.get(arguments.tenant).id
    rows = service.audit(tenant_id, limit=arguments.limit, before=arguments.before, action=arguments.action)
    desk.show(
        {
            "id": row.id,
            "at": row.created_at,
            "tenant": None if row.tenant_id is None else names.get(row.tenant_id, row.tenant_id),
            "actor": row.actor,
            "action": row.action,
            "resource": row.resource,
            "detail": row.detail,
        }
        for row in rows
    )
    return 0
