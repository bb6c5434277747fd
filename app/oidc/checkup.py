"""Whether the identity provider that is set can be used as it is set, for the operator's doctor."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from app.oidc.fetching import ProviderAway
from app.oidc.provider import look_up
from app.settings import OidcSettings


def examined(settings: OidcSettings, tenants: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """What was looked at, and what is wrong with it. `tenants`: the names of those that there are. Blocks."""
    unknown = {*settings.tenants.values()} - {*tenants}
    troubles = [f"OIDC_TENANTS: there is no tenant {name!r}" for name in sorted(unknown)]
    try:
        known = look_up(settings.issuer)
    except ProviderAway as error:
        return {"issuer": settings.issuer, "keys": 0}, [str(error), *troubles]
    needed: dict[str, str] = {}
    if settings.client_id:
        needed |= dict.fromkeys(("authorization_endpoint", "token_endpoint"), "OIDC_CLIENT_ID")
        if known.challenges is not None and "S256" not in known.challenges:
            troubles.append("it takes no PKCE by S256, which signing in needs (OIDC_CLIENT_ID)")
    if settings.cli_client_id:
        needed["device_authorization_endpoint"] = "OIDC_CLI_CLIENT_ID"
    missing = {name: by for name, by in needed.items() if name not in known.endpoints}
    troubles += [f"it offers no {name}, which {by} needs" for name, by in missing.items()]
    return {"issuer": known.issuer, "keys": len(known.keys)}, troubles
