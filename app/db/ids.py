"""Opaque, prefixed, time-ordered ids, so that sorting by id is newest-first pagination."""

from __future__ import annotations

import secrets
import threading

from app.db.clock import CLOCK

_RANDOM_BITS, _STEP_BITS = 80, 64


class _Last:
    """What the last id of this process was made of: one of the same millisecond comes after it."""

    lock = threading.Lock()
    milliseconds = 0
    random = 0


def new_id(prefix: str) -> str:
    """`prefix_` + 48 bits of milliseconds + 80 random bits, in hex: 36 characters and the prefix are enough for all. In
    one process each is larger than the one before it of the same millisecond."""
    now = int(CLOCK.now() * 1000)
    with _Last.lock:
        if now != _Last.milliseconds:
            _Last.milliseconds, _Last.random = now, secrets.randbits(_RANDOM_BITS - 1)
        else:
            _Last.random += 1 + secrets.randbits(_STEP_BITS)
        number = _Last.random
    return f"{prefix}_{now:012x}{number:0{_RANDOM_BITS // 4}x}"
