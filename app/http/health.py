"""`/healthz`, `/readyz` and `/metrics`: for operators, without a key. They name tenants only where `METRICS_TENANTS`
asks for it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from app.background import Background
from app.capabilities.repository import StatisticsRepository
from app.db.migrate import check_revision
from app.db.uow import Database
from app.errors import AppError
from app.http.deps import ServicesDep
from app.http.ending import Ending
from app.http.metrics import CONTENT_TYPE
from app.http.problem import problems
from app.http.services import Services
from app.http.threads import SharedReads
from app.operations.statistics import Snapshot, take
from app.queue.producer import check_broker

log = structlog.get_logger(__name__)

router = APIRouter(tags=["operation"], responses=problems(421, 500))

_CHECK_CACHE_S = 1.0
_PATIENCE_S = 5.0  # for one check: what hangs is named, too


class Health(BaseModel):
    status: str


class Check(BaseModel):
    ok: bool
    detail: str


class Readiness(BaseModel):
    """Whether this process can serve, and what the service as a whole lacks."""

    ready: bool = Field(description="This process can serve; the answer's status is 200, else 503")
    status: Literal["ready", "degraded", "unavailable"] = Field(
        description="`degraded`: it can serve, but not everything works"
    )
    missing: list[str] = Field(description="Names of the checks that failed")
    checks: dict[str, Check]


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get(
    "/readyz", response_model=Readiness, responses={503: {"model": Readiness, "description": "It cannot serve"}}
)
async def readyz(request: Request) -> Response:
    """503 only where this process can serve nothing (the database is away, or not migrated). What else is missing (a
    live worker, the queue, the storage) is named with 200: polls and downloads go on. As of the last second."""
    cached: CachedReadiness = request.app.state.readiness
    result = await cached()
    return Response(result.model_dump_json(), 200 if result.ready else 503, media_type="application/json")


@dataclass(frozen=True)
class Probe:
    """One thing to look at. `call` may take long; it raises where something is wrong. `needed`: without it nothing can
    be served."""

    name: str
    call: Callable[[], str | None]
    needed: bool = False


def probes_of(services: Services, background: Background, ending: Ending) -> list[Probe]:
    """The storage is not needed: it is the same for every process, and polls, streams, lists and cancels go on, while
    what needs it says so itself."""
    return [
        Probe("process", lambda: _goes_on(ending), needed=True),
        Probe("database", lambda: ping(services.db), needed=True),
        Probe("migrations", lambda: check_revision(services.db), needed=True),
        Probe("queue", lambda: check_broker(services.settings)),
        Probe("storage", services.content.store.check),
        Probe("worker", lambda: _live_workers(services)),
        Probe("background", lambda: _nothing_died(background)),
    ]


class Examiner:
    """Runs all probes at once, each in a thread of its own. One that hangs is named, and not begun again beside
    itself."""

    def __init__(self, probes: list[Probe], patience_s: float = _PATIENCE_S) -> None:
        self._probes = probes
        self._patience_s = patience_s
        self._running = SharedReads()
        self._limiter = CapacityLimiter(len(probes))

    async def __call__(self) -> Readiness:
        tasks = {probe.name: self._start(probe) for probe in self._probes}
        await asyncio.wait(tasks.values(), timeout=self._patience_s)
        checks = {name: task.result() if task.done() else self._silent() for name, task in tasks.items()}
        missing = [name for name, check in checks.items() if not check.ok]
        ready = not any(probe.needed and probe.name in missing for probe in self._probes)
        status: Literal["ready", "degraded", "unavailable"] = "unavailable"
        if ready:
            status = "degraded" if missing else "ready"
        return Readiness(ready=ready, status=status, missing=missing, checks=checks)

    def _start(self, probe: Probe) -> asyncio.Task[Check]:
        return self._running.start(
            probe.name, lambda: to_thread.run_sync(_check, probe.call, limiter=self._limiter, abandon_on_cancel=True)
        )

    def _silent(self) -> Check:
        return Check(ok=False, detail=f"has not answered for {self._patience_s:g} s")


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
    live = services.capabilities.live()
    with services.db.read() as session:
        return take(session, live, tenants=services.settings.metrics.tenants)


class CachedReadiness:
    """Anyone may ask, without a key, so questions of the same second share one run."""

    def __init__(self, take: Callable[[], Awaitable[Readiness]]) -> None:
        self._take = take
        self._lock = asyncio.Lock()
        self._taken: tuple[float, Readiness] | None = None

    async def __call__(self) -> Readiness:
        async with self._lock:
            if self._taken is None or time.monotonic() - self._taken[0] > _CHECK_CACHE_S:
                result = await self._take()
                self._taken = (time.monotonic(), result)
            return self._taken[1]


class CachedSnapshot:
    """Anyone may ask, without a key, so scrapes of the same second share one count."""

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


def _goes_on(ending: Ending) -> str:
    if ending.begun:
        raise AppError("process_ending", "Ending", 503, "This process is being ended.", retryable=True)
    return "ok"


def _nothing_died(background: Background) -> str:
    if died := background.died_of_late():
        detail = f"Died of a fault within the last minute, see the log: {', '.join(died)[:300]}."
        raise AppError("background_died", "Background failed", 503, detail, retryable=True)
    return "ok"


def _check(probe: Callable[[], str | None]) -> Check:
    try:
        return Check(ok=True, detail=probe() or "ok")
    except AppError as error:
        return Check(ok=False, detail=error.detail)
    except Exception as error:
        # Addresses and credentials may stand in the message: they go to the log only.
        log.warning("not_ready", exc_info=error)
        return Check(ok=False, detail=f"cannot be used ({type(error).__name__})")
