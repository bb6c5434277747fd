"""`anneal-admin tenants`: who may use the service, and how much of it."""

from __future__ import annotations

import argparse
from typing import Any

from app.admin.desk import Desk
from app.admin.plans import add_limits, limits_in
from app.db.accounts import Tenant
from app.domain.plan import DEFAULT_PLAN
from app.tenants.service import TenantService

HELP = "tenants: make, list, switch off and on, put on a plan"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help="all tenants, and what each uses").set_defaults(run=_list)
    create = verbs.add_parser("create", help="make a tenant; `keys create` makes its first key")
    create.add_argument("name")
    create.add_argument("--plan", help=f"({DEFAULT_PLAN})")
    create.set_defaults(run=_create)
    for verb, words in (
        ("disable", "its keys and browsers are refused within two seconds; its jobs go on to their end"),
        ("enable", "let it in again"),
    ):
        switch = verbs.add_parser(verb, help=words)
        switch.add_argument("tenant", help="name or id")
        switch.set_defaults(run=_switch, on=verb == "enable")
    plan = verbs.add_parser("plan", help="put a tenant on a plan, or give it limits of its own; without, show them")
    plan.add_argument("tenant", help="name or id")
    plan.add_argument("--plan", help="the plan's name")
    plan.add_argument("--clear", action="store_true", help="drop the limits of its own that it has")
    add_limits(plan)
    plan.set_defaults(run=_plan)


def _service(desk: Desk) -> TenantService:
    return TenantService(desk.db, desk.settings.limits)


def _list(_: argparse.Namespace, desk: Desk) -> int:
    service = _service(desk)
    desk.show([_row(service, tenant) for tenant in service.all()])
    return 0


def _create(arguments: argparse.Namespace, desk: Desk) -> int:
    service = _service(desk)
    desk.show([_row(service, service.create(arguments.name, arguments.plan, actor=desk.actor))])
    return 0


def _switch(arguments: argparse.Namespace, desk: Desk) -> int:
    service = _service(desk)
    desk.show([_row(service, service.switch(arguments.tenant, on=arguments.on, actor=desk.actor))])
    return 0


def _plan(arguments: argparse.Namespace, desk: Desk) -> int:
    service, own = _service(desk), limits_in(arguments)
    if arguments.plan is not None or own.named() or arguments.clear:
        service.put_on(arguments.tenant, arguments.plan, own, clear=arguments.clear, actor=desk.actor)
    tenant, plan, limits, usage = service.standing(service.get(arguments.tenant).id)
    used = {
        "stored_bytes": usage.stored_bytes + usage.upload_bytes,
        "active_jobs": usage.jobs_queued + usage.jobs_running,
        "running_jobs": usage.jobs_running,
        "gpu_seconds": round(usage.gpu_seconds),
    }
    own_names = tenant.limits or {}
    desk.say(f"{tenant.name}: plan {plan}")
    desk.show(
        {"limit": name, "used": used.get(name), "allowed": value, "by": "its own" if name in own_names else "the plan"}
        for name, value in limits.model_dump().items()
    )
    return 0


def _row(service: TenantService, tenant: Tenant) -> dict[str, Any]:
    _, plan, _, usage = service.standing(tenant.id)
    return {
        "id": tenant.id,
        "name": tenant.name,
        "plan": plan,
        "created_at": tenant.created_at,
        "disabled_at": tenant.disabled_at,
        "stored_bytes": usage.stored_bytes,
        "queued": usage.jobs_queued,
        "running": usage.jobs_running,
        "gpu_seconds": round(usage.gpu_seconds),
    }
