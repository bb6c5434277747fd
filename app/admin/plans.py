"""`anneal-admin plans`: limits that tenants share."""

from __future__ import annotations

import argparse

from app.admin.desk import Desk
from app.domain.plan import DEFAULT_PLAN, Limits
from app.tenants.service import TenantService, limits_of

HELP = "plans: list, and set their limits"
_NONE = "none"


def add(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("list", help=f"all plans; who has no other is on {DEFAULT_PLAN!r}").set_defaults(run=_list)
    change = verbs.add_parser("set", help="make a plan, or give one these limits in the place of those that it has")
    change.add_argument("name")
    add_limits(change)
    change.set_defaults(run=_set)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """An option for each limit."""
    for name, field in Limits.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        words = " ".join((field.description or "").replace("%", "%%").split())
        parser.add_argument(option, dest=f"limit_{name}", metavar="N", help=f"{words} `{_NONE}`: no limit.")


def limits_in(arguments: argparse.Namespace) -> Limits:
    """Those that were given; raises 422 for what is no number."""
    given = {name: getattr(arguments, f"limit_{name}") for name in Limits.model_fields}
    return limits_of({name: None if text == _NONE else text for name, text in given.items() if text is not None})


def _list(_: argparse.Namespace, desk: Desk) -> int:
    plans = TenantService(desk.db, desk.settings.limits).plans()
    desk.show([{"name": plan.name, **dict.fromkeys(Limits.model_fields), **plan.limits} for plan in plans])
    return 0


def _set(arguments: argparse.Namespace, desk: Desk) -> int:
    service = TenantService(desk.db, desk.settings.limits)
    plan = service.set_plan(arguments.name, limits_in(arguments), actor=desk.actor)
    desk.show([{"name": plan.name, **dict.fromkeys(Limits.model_fields), **plan.limits}])
    return 0
