"""Opaque, prefixed, time-ordered ids, so that sorting by id is newest-first pagination."""

from __future__ import annotations

import secrets

from app.db.clock import CLOCK


def new_id(prefix: str) -> str:
    """`prefix_` + 48 bits of milliseconds + 80 random bits, in hex: 36 characters and the prefix are enough for all."""
    return f"{prefix}_{int(CLOCK.now() * 1000):012x}{secrets.token_hex(10)}"
