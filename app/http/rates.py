"""How often a tenant may ask, and an address may try to sign in: counted per minute, in Redis where the broker is one,
so that all API processes count together; else in this process. A count that cannot be had refuses nobody."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import structlog
from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio import ConnectionPool
from redis.exceptions import RedisError

from app.errors import AppError

log = structlog.get_logger(__name__)

_PATIENCE_S = 0.25
_AWAY_S = 2.0  # not asked again for so long
_TOLD_S = 60.0
_CONNECTIONS = 50


@dataclass(frozen=True)
class Rate:
    """What is left of this minute. `resets_s`: until there is more."""

    limit: int
    remaining: int
    resets_s: int
    exceeded: bool

    def headers(self) -> dict[str, str]:
        """As the IETF's draft on RateLimit headers had them, and gateways send them."""
        return {
            "RateLimit-Limit": str(self.limit),
            "RateLimit-Remaining": str(self.remaining),
            "RateLimit-Reset": str(self.resets_s),
        }

    def refusal(self, whose: str) -> AppError:
        """429 `too_many_requests`."""
        detail = f"{whose} may make {self.limit} requests a minute."
        headers = {"Retry-After": str(self.resets_s), **self.headers()}
        extra = {"used": self.limit, "allowed": self.limit}
        remedy = "Ask less often (a job's `wait=30` answers as soon as something changes), or ask for a larger plan."
        return AppError(
            "too_many_requests",
            "Too many requests",
            429,
            detail,
            retryable=True,
            remedy=remedy,
            extra=extra,
            headers=headers,
        )


class Rates:
    """Made and used in one event loop. `url`: `redis://…`; any other counts here alone."""

    def __init__(self, url: str) -> None:
        self._pool: ConnectionPool | None = None
        storage: MemoryStorage | RedisStorage = MemoryStorage()
        if url.startswith(("redis://", "rediss://")):
            self._pool = ConnectionPool.from_url(
                url, socket_timeout=_PATIENCE_S, socket_connect_timeout=_PATIENCE_S, max_connections=_CONNECTIONS
            )
            options: dict[str, Any] = {"implementation": "redispy", "connection_pool": self._pool}
            storage = RedisStorage(f"async+{url}", key_prefix="anneal:rates", **options)
        self._limiter = SlidingWindowCounterRateLimiter(storage)
        self._away_until = 0.0
        self._told_at = -math.inf

    async def take(self, kind: str, who: str, per_minute: int) -> Rate | None:
        """One more request of `who`; None where it cannot be counted now."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return await asyncio.wait_for(self._take(kind, who, per_minute), 2 * _PATIENCE_S)
        except Exception as error:
            # Whatever the client raises (it is away, full, refuses the password): nobody waits for a counter.
            now = time.monotonic()
            self._away_until = now + _AWAY_S
            if now - self._told_at >= _TOLD_S:
                self._told_at = now
                log.warning("rates_not_counted", error=f"{type(error).__name__}: {error}"[:200])
            return None

    async def _take(self, kind: str, who: str, per_minute: int) -> Rate:
        item = RateLimitItemPerMinute(max(per_minute, 1))
        allowed = per_minute > 0 and await self._limiter.hit(item, kind, who)
        resets_at, remaining = await self._limiter.get_window_stats(item, kind, who)
        left_s = max(math.ceil(resets_at - time.time()), 1)
        return Rate(per_minute, max(int(remaining), 0) if allowed else 0, left_s, not allowed)

    async def close(self) -> None:
        if self._pool is not None:
            with suppress(RedisError, OSError):  # the process ends
                await self._pool.aclose()
