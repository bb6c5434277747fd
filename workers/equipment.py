"""What a worker does its work with, whichever work it is: a job of its own, a call of another's, an engine that is
built ahead, a question about a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from app.blobs.content import ContentStore
from app.jobs.holds import Hold
from app.jobs.ledger import JobLedger
from app.settings import Settings
from workers.installation import Installation, key_for_tenant
from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner
from workers.pipeline.shared_caches import SharedCaches
from workers.pipeline.workspace import Workspace, open_workspace
from workers.telemetry.watch import Watch


class Particular(TypedDict, total=False):
    """What of a `StageRunner` depends on the work."""

    shared_caches: SharedCaches
    measure_again: bool
    watch: Watch
    elsewhere: Callable[[str, float], bool]


@dataclass(frozen=True)
class Equipment:
    """Of one worker process. `hardware`: of its machine (`workers.hardware.describe`); `fingerprint`: of that;
    `engine_key`: what engines in native code are signed with."""

    worker_id: str
    settings: Settings
    ledger: JobLedger
    content: ContentStore
    isolated: IsolatedRunner
    hardware: Mapping[str, Any]
    fingerprint: str
    engine_key: bytes = field(repr=False)

    @property
    def limits(self) -> Limits:
        """Of one stage call."""
        worker = self.settings.worker
        memory = worker.stage_memory_mb << 20 or int(self.hardware["memory_bytes"] * 0.8)
        return Limits(worker.stage_timeout_s, memory, worker.stage_disk_mb << 20)

    def installation(self, tenant_id: str) -> Installation:
        """What the stages of this tenant's jobs get of the installation."""
        return Installation(key_for_tenant(self.engine_key, tenant_id), self.settings.home_dir / "cache")

    def workspace(self, name: str, tenant_id: str) -> AbstractContextManager[Workspace]:
        """A folder of this name for as long as the work takes, with the tenant's content."""
        return open_workspace(self.settings.home_dir, name.replace("/", "-"), tenant_id, self.content)

    def runner(
        self, hold: Hold, workspace: Workspace, should_stop: Callable[[], bool], **particular: Unpack[Particular]
    ) -> StageRunner:
        """What runs the stage calls of a job."""
        return StageRunner(
            claim=hold,
            ledger=self.ledger,
            isolated=self.isolated,
            workspace=workspace,
            hardware=self.hardware,
            fingerprint=self.fingerprint,
            limits=self.limits,
            lock_dir=self.settings.worker.lock_dir,
            should_stop=should_stop,
            installation=self.installation(hold.tenant_id),
            **particular,
        )
