"""What a key may do. Each role may do what the ones before it may."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """`read`: look and download. `submit`: upload, run and cancel jobs, delete what is the tenant's. `admin`: the
    tenant's keys and its audit rows, too. `operator`: what `anneal-admin` does, of all tenants (`/v1/operator`); only
    the command line makes such a key."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"
    OPERATOR = "operator"

    def may(self, needed: Role) -> bool:
        return _ORDER.index(self) >= _ORDER.index(needed)


_ORDER = tuple(Role)
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def needed_by(method: str) -> Role:
    """The role that a request of this HTTP method needs, wherever it goes; a route may need more."""
    return Role.READ if method in _SAFE else Role.SUBMIT
