"""Opaque, prefixed, time-ordered ids, so that sorting by id is newest-first pagination."""

from __future__ import annotations

import secrets
import time


def new_id(prefix: str) -> str:
    """`prefix_` + 48 bits of milliseconds + 80 random bits, in hex: 36 characters and the prefix are enough for all."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"
