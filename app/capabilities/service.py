"""What live workers offer: their hardware, backends, precisions and the model formats that they take."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from app.audit import current_actor, record
from app.capabilities.repository import WorkerRepository
from app.db.base import utcnow
from app.db.orm import Worker
from app.db.uow import Database
from app.settings import Settings

_KNOWN_FOR = timedelta(hours=24)


@dataclass(frozen=True)
class Beat:
    """What a worker is told at its heartbeat. `draining`: it is to take no more jobs."""

    draining: bool


class CapabilityService:
    """Used by workers (report, heartbeat, stopped) and by the API and job submission (live, known)."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        # A worker on a busy machine may miss a few beats without being dead.
        self._live_for = timedelta(seconds=max(10.0, 5 * settings.worker.heartbeat_s))

    def report(
        self,
        worker_id: str,
        *,
        hostname: str,
        hardware: Mapping[str, Any],
        backends: Sequence[Mapping[str, Any]],
        formats: Sequence[str],
        queues: Sequence[str],
        plugins: Sequence[Mapping[str, Any]] = (),
        examines: Mapping[str, str] | None = None,
        builds: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
        isolation: Mapping[str, Any] | None = None,
        helps: str | None = None,
    ) -> None:
        """A worker starts: what it is and can. `backends`: list of {name, versions, devices, precisions}. `plugins`:
        list of {group, name, distribution, version, problem}, those that cannot be used among them. `examines`:
        backend → version, of those that it can ask what they take of a model. `builds`: backend → target → precisions,
        of those that it builds for without having one. `isolation`: `app.sandbox.features.Features.to_json`. `helps`:
        workers that say the same would make the same, and help each other.
        """
        apart = {
            "plugins": [dict(plugin) for plugin in plugins],
            "examines": dict(examines or {}),
            "isolation": dict(isolation or {}),
            "helps": helps,
            "builds": {backend: {k: [*v] for k, v in targets.items()} for backend, targets in (builds or {}).items()},
        }
        fields = {
            "hostname": hostname[:255],
            "hardware": {**hardware, **apart},
            "backends": [dict(backend) for backend in backends],
            "formats": [*formats],
            "queues": [*queues],
        }
        with self._db.write() as uow:
            WorkerRepository(uow.session).upsert(worker_id, fields)

    def heartbeat(self, worker_id: str) -> Beat | None:
        """A sign of life, and what it is answered. None where nobody knows this worker (any more): it has to `report`
        again."""
        with self._db.write() as uow:
            draining = WorkerRepository(uow.session).touch(worker_id)
        return None if draining is None else Beat(draining)

    def stopped(self, worker_id: str) -> None:
        """An orderly goodbye."""
        with self._db.write() as uow:
            WorkerRepository(uow.session).stop(worker_id)

    def drain(self, worker_id: str, *, draining: bool) -> bool:
        """From its next heartbeat on this worker takes no job, or does so again, until it starts anew. False where
        nobody knows it."""
        with self._db.write() as uow:
            known = WorkerRepository(uow.session).drain(worker_id, draining=draining)
            if known:
                action = "worker.drain" if draining else "worker.resume"
                record(uow.session, None, current_actor(), action, worker_id)
            return known

    def live(self) -> list[Worker]:
        """Workers that would take a job now."""
        with self._db.read() as session:
            found = WorkerRepository(session).seen_since(utcnow() - self._live_for, stopped=False)
        return [worker for worker in found if worker.draining_at is None]

    def known(self) -> list[Worker]:
        """Workers seen in the last 24 hours, live or not."""
        with self._db.read() as session:
            return WorkerRepository(session).seen_since(utcnow() - _KNOWN_FOR, stopped=True)


def offered(workers: Collection[Worker]) -> dict[str, list[str]]:
    """What these workers offer together: sorted `devices`, `backends`, `precisions`, `formats` and `hardware` ids."""
    found: dict[str, set[str]] = {name: set() for name in ("devices", "backends", "precisions", "formats", "hardware")}
    for worker in workers:
        found["formats"].update(worker.formats)
        if "id" in worker.hardware:
            found["hardware"].add(str(worker.hardware["id"]))
        for backend in worker.backends:
            found["backends"].add(str(backend["name"]))
            found["devices"].update(backend.get("devices", ()))
            found["precisions"].update(backend.get("precisions", ()))
    return {name: sorted(values) for name, values in found.items()}
