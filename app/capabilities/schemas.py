"""What `GET /v1/capabilities` answers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, Field

from app.capabilities.service import offered
from app.db.orm import Worker

# What a worker reports beside its hardware, in the same column.
_APART = ("plugins", "examines", "builds", "isolation", "helps")


class BackendOut(BaseModel):
    """An inference library of a worker, and the precisions that it gains by on that worker's hardware."""

    name: str
    versions: dict[str, str] = {}
    devices: list[str] = []
    precisions: list[str] = []


class PluginOut(BaseModel):
    """A backend or stage from another package. `problem`: why the worker cannot use it; null where it can."""

    group: str
    name: str
    distribution: str
    version: str
    problem: str | None


class IsolationOut(BaseModel):
    """What a worker confines models with. `missing`: what is open for want of something, in words."""

    mode: str = Field(description="auto: with what the machine has; required: with no less than files and network; off")
    landlock: int = Field(description="ABI of the kernel's Landlock, 0 = none")
    seccomp: bool
    namespaces: bool
    network: str | None = Field(None, description="of stages: none, or open")
    network_of_load_tests: str | None = Field(
        None, description="of stages that serve: own (a loopback of their own), ports (those handed out), tcp, open"
    )
    missing: list[str] = []


class WorkerOut(BaseModel):
    id: str
    hostname: str
    hardware: dict[str, Any] = Field(description="CPU model, ISA flags, cores, memory, GPU …, as the worker found it")
    backends: list[BackendOut]
    formats: list[str]
    queues: list[str]
    plugins: list[PluginOut] = []
    examines: dict[str, str] = Field({}, description="Backends that it can ask what they take of a model: version")
    builds: dict[str, dict[str, list[str]]] = Field(
        {}, description="Backends that it builds with for devices that it need not have: target: precisions"
    )
    isolation: IsolationOut | None = None
    helps: str | None = Field(
        None, description="Its kind: while idle it makes candidates for jobs of workers that say the same"
    )
    started_at: datetime
    last_seen_at: datetime


class CapabilitiesOut(BaseModel):
    """What the live workers offer together, and each of them."""

    devices: list[str]
    backends: list[str]
    precisions: list[str]
    formats: list[str]
    hardware: list[str] = Field(description="Hardware ids that `target.hardware` of a job may name")
    workers: list[WorkerOut]
    links: dict[str, str]

    @classmethod
    def of(cls, workers: list[Worker]) -> CapabilitiesOut:
        return cls(
            **offered(workers),
            workers=[
                WorkerOut(
                    id=row.id,
                    hostname=row.hostname,
                    hardware={k: v for k, v in row.hardware.items() if k not in _APART},
                    backends=[BackendOut.model_validate(backend) for backend in row.backends],
                    formats=row.formats,
                    queues=row.queues,
                    plugins=[PluginOut.model_validate(plugin) for plugin in row.hardware.get("plugins", ())],
                    examines=row.hardware.get("examines") or {},
                    builds=row.hardware.get("builds") or {},
                    isolation=IsolationOut.model_validate(told) if (told := row.hardware.get("isolation")) else None,
                    helps=row.hardware.get("helps"),
                    started_at=row.started_at,
                    last_seen_at=row.last_seen_at,
                )
                for row in workers
            ],
            links={"self": "/v1/capabilities"},
        )
