"""From what a token claims to who asks: its tenant and its role here, by the operator's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from app.db.uow import Database
from app.domain.roles import Role
from app.errors import AppError
from app.names import forbidden_character
from app.settings import OidcSettings
from app.tenants.callers import Caller, caller_of_subject

_LONGEST = 200  # of a tenant's name, and of a person's
_MOST = 1000  # values of a claim
_END_OF_TIME = datetime(9999, 1, 1, tzinfo=UTC)


def caller_of(db: Database, claims: Mapping[str, Any], settings: OidcSettings, leeway_s: float) -> Caller:
    """403 `tenant_missing` where the claims name no tenant that there is here, or several; 403 `role_missing` where
    they give no role. Blocks."""
    tenant, role = tenant_of(claims, settings), role_of(claims, settings)
    caller = caller_of_subject(db, tenant, str(claims["sub"]), role, moment(claims["exp"], leeway_s))
    if caller is None:
        raise _no_tenant(settings, f"it names {tenant!r}, which there is not here")
    return caller


def tenant_of(claims: Mapping[str, Any], settings: OidcSettings) -> str:
    """The name of the one tenant that the claim stands for."""
    values = [v for v in _values(claim(claims, settings.tenant_claim)) if _is_name(v)]
    found = {settings.tenants[v] for v in values if v in settings.tenants} if settings.tenants else set(values)
    if len(found) != 1:
        raise _no_tenant(settings, f"it names {len(found)} tenants" if found else "it names none")
    return found.pop()


def role_of(claims: Mapping[str, Any], settings: OidcSettings) -> Role:
    """The largest of those that the claim's values stand for; a text holds several, as `scope` does."""
    found = claim(claims, settings.roles_claim)
    values = [found, *found.split()] if isinstance(found, str) else _values(found)
    roles = [settings.roles[v] for v in values if v in settings.roles]
    if not roles:
        detail = f"The claim {settings.roles_claim!r} of the identity provider's token gives no role of this service."
        remedy = "Ask whoever runs the identity provider for one of the roles of this service (OIDC_ROLES)."
        raise AppError("role_missing", "Not allowed", 403, detail, remedy=remedy)
    return max(roles, key=list(Role).index)


def name_of(claims: Mapping[str, Any]) -> str:
    """What a person is shown as."""
    for name in ("preferred_username", "email", "name"):
        found = claims.get(name)
        if isinstance(found, str) and _is_name(found):
            return found
    return str(claims["sub"])[:_LONGEST]


def claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, else by a path through objects: `realm_access.roles`."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for step in name.split("."):
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def moment(seconds: float, later_s: float) -> datetime:
    """So much after a time of a token, which may be any number."""
    try:
        return datetime.fromtimestamp(seconds + later_s, UTC)
    except (OverflowError, ValueError, OSError):
        return _END_OF_TIME


def _values(found: Any) -> Iterator[str]:
    """The texts of a claim that is one or a list of them."""
    yield from (v for v in (found[:_MOST] if isinstance(found, list) else [found]) if isinstance(v, str))


def _is_name(text: str) -> bool:
    return 0 < len(text) <= _LONGEST and forbidden_character(text) is None


def _no_tenant(settings: OidcSettings, why: str) -> AppError:
    claim_name = settings.tenant_claim
    detail = f"The claim {claim_name!r} of the identity provider's token names no tenant of this service: {why}."
    remedy = "Ask whoever runs the identity provider, or the operator of this service (OIDC_TENANTS)."
    return AppError("tenant_missing", "Not allowed", 403, detail, remedy=remedy)
