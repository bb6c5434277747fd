"""Whether a tenant may have more: asked in the transaction that would give it more, with the tenant locked, so that of
two who race for the last place one is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.blobs.references import is_held
from app.blobs.usage import bytes_of, stored_bytes_of
from app.db.accounts import GpuUse, Plan
from app.db.base import utcnow
from app.db.locks import try_lock
from app.db.orm import Job, Upload
from app.domain.job_state import JobStatus
from app.domain.plan import DEFAULT_PLAN, WINDOW_DAYS, Limits, effective
from app.domain.upload_state import UploadState
from app.errors import AppError
from app.jobs.family import PARENTS
from app.queue.messages import on_gpu
from app.settings import LimitSettings
from app.tenants.repository import TenantRepository

_OPEN = (UploadState.OPENING, UploadState.OPEN, UploadState.COMPLETING)
_ACTIVE = (JobStatus.QUEUED.value, JobStatus.RUNNING.value)


@dataclass(frozen=True)
class Usage:
    """What a tenant uses now. `gpu_seconds`: of the last 30 days, running jobs included."""

    stored_bytes: int
    upload_bytes: int
    jobs_queued: int
    jobs_running: int
    gpu_seconds: float


class Quotas:
    """The limits of one tenant within a transaction. `lock`: others who ask so for this tenant wait for its end. It has
    to be asked for before other rows are locked: locks go from the tenant to what is its own."""

    def __init__(self, session: Session, tenant_id: str, settings: LimitSettings, *, lock: bool = True) -> None:
        self._session = session
        self._tenant_id = tenant_id
        self._settings = settings
        tenant = TenantRepository(session).get(tenant_id, lock=lock)
        self.plan = DEFAULT_PLAN if tenant is None or tenant.plan is None else tenant.plan
        row = session.get(Plan, self.plan)
        own = None if tenant is None else tenant.limits
        self.limits: Limits = effective(None if row is None else row.limits, own)

    # What is asked

    def check_bytes(self, more: int, *, sha256: str | None = None) -> None:
        """413 `storage_quota` where so many further bytes do not fit. `sha256`: of content that perhaps counts already,
        and then takes no further room. What is only cached of jobs' stages does not count, and would from now on."""
        allowed = self.limits.stored_bytes
        if allowed is None or self._counts(sha256):
            return
        if more <= self._room_at_least(allowed):
            return
        used = self.stored_bytes() + self.upload_bytes()
        if used + more > allowed:
            detail = f"{used} of {allowed} bytes are used, open uploads included; {more} more do not fit."
            remedy = "Delete models, data sets and uploads that are not needed any more, or ask the operator for room."
            raise self._refusal("storage_quota", 413, detail, remedy, used, allowed, needed=more)

    def room(self, *, model: bool, sha256: str | None = None, wanted: int | None = None) -> int | None:
        """Bytes that one further file, a model perhaps, may have; None for any number. `sha256`: as above. `wanted`: so
        many will do, where there is room for more."""
        limits, most = self.limits, []
        if model and limits.model_bytes is not None:
            most.append(limits.model_bytes)
        if limits.stored_bytes is not None and not self._counts(sha256):
            left = self._room_at_least(limits.stored_bytes)
            if wanted is None or left < wanted:
                left = limits.stored_bytes - self.stored_bytes() - self.upload_bytes()
            most.append(max(left, 0))
        return min(most, default=None)

    def check_model(self, size_bytes: int) -> None:
        """413 `model_quota` for a model larger than the plan takes."""
        allowed = self.limits.model_bytes
        if allowed is not None and size_bytes > allowed:
            detail = f"The model has {size_bytes} bytes; the plan {self.plan!r} takes at most {allowed}."
            remedy = "Upload a smaller one, or ask the operator for another plan."
            raise self._refusal("model_quota", 413, detail, remedy, size_bytes, allowed)

    def check_jobs(self, more: int) -> None:
        """429 `too_many_jobs` where so many further ones would be too many at once."""
        allowed = self.limits.active_jobs
        if allowed is None:
            allowed = self._settings.active_jobs_per_tenant
        active = sum(self.jobs().values())
        if active + more <= allowed:
            return
        several = f" {more} more would exceed {allowed}." if more > 1 else ""
        detail = f"{active} jobs are queued or running already; {allowed} may.{several}"
        remedy = "Wait for some of them to end, or cancel them." if more <= allowed else "Name fewer targets."
        error = self._refusal("too_many_jobs", 429, detail, remedy, active, allowed, retryable=more <= allowed)
        error.headers = {"Retry-After": "30"}
        raise error

    def check_results(self) -> None:
        """413 for a job of a tenant that has no byte left: jobs make files, and those of one that runs are taken."""
        self.check_bytes(1)

    def check_gpu(self) -> None:
        """403 `gpu_quota` where the GPU seconds of the last 30 days are used up."""
        allowed = self.limits.gpu_seconds
        used = 0.0 if allowed is None else self.gpu_seconds()
        if allowed is not None and used >= allowed:
            detail = f"{used:.0f} of {allowed} GPU seconds of the last {WINDOW_DAYS} days are used."
            remedy = (
                "Days that are past give theirs back; until then let jobs run on CPUs, or ask the operator for more."
            )
            raise self._refusal("gpu_quota", 403, detail, remedy, round(used), allowed)

    # What is used

    def usage(self) -> Usage:
        jobs = self.jobs()
        return Usage(
            stored_bytes=self.stored_bytes(),
            upload_bytes=self.upload_bytes(),
            jobs_queued=jobs.get("queued", 0),
            jobs_running=jobs.get("running", 0),
            gpu_seconds=self.gpu_seconds(),
        )

    def stored_bytes(self) -> int:
        return bytes_of(self._session, self._tenant_id)

    def upload_bytes(self) -> int:
        """What open upload sessions were declared with: their room is theirs until they end."""
        query = select(func.sum(Upload.size_bytes)).where(Upload.tenant_id == self._tenant_id, Upload.status.in_(_OPEN))
        return int(self._session.scalar(query) or 0)

    def jobs(self) -> dict[str, int]:
        """How many wait and run, without those that only compare others: these count themselves."""
        query = select(Job.status, func.count()).where(Job.tenant_id == self._tenant_id, Job.status.in_(_ACTIVE))
        found = self._session.execute(query.where(Job.queue != PARENTS).group_by(Job.status))
        return {row[0]: row[1] for row in found}

    def gpu_seconds(self) -> float:
        return gpu_seconds_of(self._session, [self._tenant_id])[self._tenant_id]

    def _room_at_least(self, allowed: int) -> int:
        """Of so many bytes, if what is only cached counted, too. Found far sooner than what does count, and enough for
        who is far from a limit."""
        return allowed - stored_bytes_of(self._session, self._tenant_id) - self.upload_bytes()

    def _counts(self, sha256: str | None) -> bool:
        return sha256 is not None and is_held(self._session, self._tenant_id, sha256)

    def _refusal(
        self,
        code: str,
        status: int,
        detail: str,
        remedy: str,
        used: int,
        allowed: int,
        *,
        needed: int | None = None,
        retryable: bool = False,
    ) -> AppError:
        extra = {"plan": self.plan, "used": used, "allowed": allowed}
        if needed is not None:
            extra["needed"] = needed
        title = "More than the plan allows"
        return AppError(code, title, status, detail, retryable=retryable, remedy=remedy, extra=extra)


def spend_gpu(session: Session, tenant_id: str, seconds: float) -> None:
    """Count seconds on a GPU for today, in the transaction that ends them."""
    insert = postgresql.insert if session.connection().dialect.name == "postgresql" else sqlite.insert
    statement = insert(GpuUse).values(tenant_id=tenant_id, day=utcnow().date(), seconds=seconds)
    more = {"seconds": GpuUse.seconds + statement.excluded.seconds}
    session.execute(statement.on_conflict_do_update(index_elements=[GpuUse.tenant_id, GpuUse.day], set_=more))


def gpu_seconds_of(session: Session, tenant_ids: Collection[str]) -> dict[str, float]:
    """By tenant: of the last 30 days, running jobs included."""
    now = utcnow()
    found = dict.fromkeys(tenant_ids, 0.0)
    ended = select(GpuUse.tenant_id, func.sum(GpuUse.seconds)).where(
        GpuUse.tenant_id.in_(found), GpuUse.day > now.date() - timedelta(days=WINDOW_DAYS)
    )
    for tenant_id, seconds in session.execute(ended.group_by(GpuUse.tenant_id)):
        found[tenant_id] += float(seconds)
    running = select(Job.tenant_id, Job.queue, Job.claimed_at).where(
        Job.tenant_id.in_(found), Job.status == JobStatus.RUNNING.value, Job.claimed_at.is_not(None)
    )
    for tenant_id, queue, claimed_at in session.execute(running):
        if claimed_at is not None and on_gpu(queue):
            found[tenant_id] += max((now - claimed_at).total_seconds(), 0.0)
    return found


def out_of_gpu_seconds(session: Session, limits: Mapping[str, int]) -> set[str]:
    """The tenants that have used up so many: none of their jobs for GPUs begins."""
    used = gpu_seconds_of(session, limits)
    return {tenant_id for tenant_id, allowed in limits.items() if used[tenant_id] >= allowed}


def may_run(session: Session, tenant_id: str, most: int) -> bool | None:
    """Whether one more job of this tenant may run, of `most` at once; None where another worker asks just now, and
    perhaps takes the last place. Nobody waits here: who claims asks of one tenant after the other, each in the order
    that he sees, and two would wait for each other. A lock that only claims take: submissions hold up none."""
    if not try_lock(session, f"running/{tenant_id}"):
        return None
    query = select(func.count()).where(Job.tenant_id == tenant_id, Job.status == JobStatus.RUNNING.value)
    return (session.scalar(query.where(Job.queue != PARENTS)) or 0) < most
