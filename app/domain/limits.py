"""How large a number may be that comes from outside: what the database's columns and the formats' own fields hold."""

from __future__ import annotations

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
