"""`/healthz`, `/readyz` and `/metrics`: for operators, without a key. They name no tenant."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import structlog
from anyio import to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from app.capabilities.repository import StatisticsRepository
from app.db.uow import Database
from app.errors import AppError
from app.http.deps import ServicesDep
from app.http.metrics import CONTENT_TYPE, Snapshot
from app.http.problem import problems
from app.http.services import Services
from app.queue.producer import check_broker

log = structlog.get_logger(__name__)

router = APIRouter(tags=["operation"], responses=problems(421, 500))

_CHECK_CACHE_S = 1.0


class Health(BaseModel):
    status: str


class Check(BaseModel):
    ok: bool
    detail: str


class Readiness(BaseModel):
    """`ready` when every part works."""

    ready: bool
    checks: dict[str, Check]


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "Not ready"}})
async def readyz(request: Request) -> Response:
    """Database, queue and storage can be used, and a live worker is there; as of the last second."""
    cached: CachedReadiness = request.app.state.readiness
    result = await cached()
    return Response(result.model_dump_json(), 200 if result.ready else 503, media_type="application/json")


def readiness(services: Services) -> Readiness:
    """Try every part: connects to the broker and the storage, so it may take seconds."""
    checks = {
        "database": _check(lambda: ping(services.db)),
        "queue": _check(lambda: check_broker(services.settings)),
        "storage": _check(services.content.store.check),
        "worker": _check(lambda: _live_workers(services)),
    }
    return Readiness(ready=all(check.ok for check in checks.values()), checks=checks)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problems(503)})
def metrics(services: ServicesDep) -> Response:
    """Prometheus metrics."""
    return Response(services.metrics.render(), media_type=CONTENT_TYPE)


def ping(db: Database) -> str:
    with db.read() as session:
        StatisticsRepository(session).ping()
    return "ok"


def snapshot(services: Services) -> Snapshot:
    """The service's state for the metrics."""
    with services.db.read() as session:
        statistics = StatisticsRepository(session)
        jobs, queued = statistics.jobs_by_status(), statistics.queue_depth()
    return Snapshot(jobs=jobs, queued=queued, live_workers=len(services.capabilities.live()))


class CachedReadiness:
    """Anyone may ask, without a key, so probes of the same second share one run; those that wait for it hold no
    thread."""

    def __init__(self, take: Callable[[], Readiness]) -> None:
        self._take = take
        self._lock = asyncio.Lock()
        self._taken: tuple[float, Readiness] | None = None

    async def __call__(self) -> Readiness:
        async with self._lock:
            if self._taken is None or time.monotonic() - self._taken[0] > _CHECK_CACHE_S:
                result = await to_thread.run_sync(self._take)
                self._taken = (time.monotonic(), result)
            return self._taken[1]


class CachedSnapshot:
    """Counting all jobs takes a while in a large table; two scrapes within a second share one count."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._lock = threading.Lock()
        self._taken: tuple[float, Snapshot] | None = None

    def __call__(self) -> Snapshot:
        with self._lock:
            if self._taken is None or time.monotonic() - self._taken[0] > _CHECK_CACHE_S:
                self._taken = (time.monotonic(), self._take())
            return self._taken[1]


def _live_workers(services: Services) -> str:
    count = len(services.capabilities.live())
    if not count:
        raise AppError("no_worker", "No worker", 503, "No live worker.", retryable=True)
    return f"{count} live"


def _check(probe: Callable[[], str | None]) -> Check:
    try:
        return Check(ok=True, detail=probe() or "ok")
    except AppError as error:
        return Check(ok=False, detail=error.detail)
    except Exception as error:
        # Addresses and credentials may stand in the message: they go to the log only.
        log.warning("not_ready", exc_info=error)
        return Check(ok=False, detail=f"cannot be used ({type(error).__name__})")
