"""What clients can do with jobs: submit, look, cancel, delete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from sqlalchemy.orm import Session

from app.audit import as_stored, current_actor, record
from app.blobs.content import ContentStore
from app.blobs.removal import release
from app.capabilities.service import CapabilityService
from app.db.base import utcnow
from app.db.ids import new_id
from app.db.orm import Job, JobEvent, SourceModel
from app.db.uow import Database, UnitOfWork
from app.domain.job_state import TERMINAL, JobStatus, Trigger
from app.domain.spec import OptimizationSpec, datasets_of, stored
from app.errors import FieldError, conflict, invalid_request, not_found
from app.idempotency import Idempotency, once, recall, remember, resource_gone
from app.jobs.admission import Queue, check_shapes, find_queue, fit_batch_sizes
from app.jobs.chain_admission import Source, pointer_of, source_of
from app.jobs.data_admission import check_dataset, check_inputs
from app.jobs.family import PARENTS, stages_of
from app.jobs.metric_admission import check_metric
from app.jobs.removal import remove_jobs
from app.jobs.repository import JobRepository
from app.jobs.schedule import turn_of
from app.jobs.target_admission import per_target
from app.jobs.traffic_admission import fit_traffic
from app.jobs.training_admission import check_training
from app.prebuilds.repository import PrebuildRepository
from app.queue.messages import on_gpu
from app.queue.producer import Dispatch
from app.settings import Settings
from app.tenants.quotas import Quotas


@dataclass(frozen=True)
class Origin:
    """Where a job comes from: whose it is, and the request that submitted it, in whose name."""

    tenant_id: str
    correlation_id: str
    actor: str
    traceparent: str | None = None


class JobService:
    def __init__(self, db: Database, content: ContentStore, dispatch: Dispatch, settings: Settings) -> None:
        self.db = db
        self.content = content
        self.dispatch = dispatch
        self.settings = settings
        self.capabilities = CapabilityService(db, settings)

    def submit(
        self,
        tenant_id: str,
        spec: OptimizationSpec,
        *,
        correlation_id: str,
        idempotency: Idempotency | None,
        traceparent: str | None = None,
    ) -> tuple[Job, bool]:
        """Queue a job; the row, and whether it is new. `traceparent`: of the span that its own are to follow. Raises
        `AppError` for a spec that cannot be met here."""
        origin = Origin(tenant_id, correlation_id, current_actor(), traceparent)
        return once(idempotency, lambda: self._submit(origin, spec, idempotency))

    def _submit(self, origin: Origin, spec: OptimizationSpec, idempotency: Idempotency | None) -> tuple[Job, bool]:
        tenant_id = origin.tenant_id
        live, known = self.capabilities.live(), self.capabilities.known()
        with self.db.write() as uow:
            session, jobs = uow.session, JobRepository(uow.session)
            earlier = recall(session, tenant_id, idempotency) if idempotency else None
            if earlier is not None:
                job = jobs.get(tenant_id, earlier)
                if job is None:
                    raise resource_gone("job")
                return job, False
            quotas = Quotas(session, tenant_id, self.settings.limits)
            source = source_of(spec, self._models(session, tenant_id, spec))
            if spec.inputs is not None:
                check_inputs(spec.inputs, source.inputs)
            if spec.shapes is not None:
                check_shapes(spec.shapes, source.inputs)
                spec = fit_batch_sizes(spec, source.inputs)
            spec = fit_traffic(spec, source.inputs)
            self._datasets(session, tenant_id, spec, source)
            if spec.targets is not None:
                wanted = per_target(spec, source.format, live)
            else:
                wanted = [(spec, find_queue(spec, source.format, live, known))]
            quotas.check_jobs(len(wanted))
            quotas.check_results()
            if any(on_gpu(queue.name) for _, queue in wanted):
                quotas.check_gpu()
            queued = partial(_queued, origin=origin)
            parent = _running(queued(new_id("job"), spec, Queue(PARENTS), None)) if spec.targets is not None else None
            if parent is not None:
                jobs.add(parent)
            # Ids of one moment are in no order: theirs is to be that of the targets.
            ids = sorted(new_id("job") for _ in wanted)
            added = [queued(i, *w, parent) for i, w in zip(ids, wanted, strict=True)]
            for job, (_, queue) in zip(added, wanted, strict=True):
                self._add(uow, job, queue)
            if parent is not None:
                parent.stages = stages_of(jobs.children(parent.id))
            submitted = parent or added[0]
            record(session, tenant_id, current_actor(), "job.submit", submitted.id, {"model_id": spec.model_id})
            if idempotency is not None:
                remember(session, tenant_id, idempotency, submitted.id)
            return submitted, True

    def _add(self, uow: UnitOfWork, job: Job, queue: Queue) -> None:
        JobRepository(uow.session).add(job)
        for backend, built_for in queue.builds.items():
            PrebuildRepository(uow.session).add(job.id, backend, built_for)
        uow.after_commit(lambda: self.dispatch(job))

    def _models(self, session: Session, tenant_id: str, spec: OptimizationSpec) -> list[SourceModel]:
        """The job's model, or those of its chain in order."""
        found = []
        for place, model_id in enumerate([spec.model_id, *(link.model_id for link in spec.links)]):
            model = JobRepository(session).usable_model(tenant_id, model_id)
            if model is None:
                error = FieldError(pointer_of(place), "unknown model")
                raise invalid_request(f"There is no model {model_id!r}.", [error], "Upload it with POST /v1/models.")
            found.append(model)
        return found

    def _datasets(self, session: Session, tenant_id: str, spec: OptimizationSpec, source: Source) -> None:
        check_training(spec, source.format)
        judging: tuple[str, list[dict[str, Any]] | None] = ("/validation/dataset_id", None)
        for pointer, dataset_id in datasets_of(spec.model_dump()).items():
            row = JobRepository(session).usable_dataset(tenant_id, dataset_id)
            if row is None:
                detail = f"There is no data set {dataset_id!r}."
                raise invalid_request(
                    detail, [FieldError(pointer, "unknown data set")], "Upload it with POST /v1/datasets."
                )
            check_dataset(
                pointer,
                row.arrays,
                source.inputs,
                source.outputs,
                spec.shapes,
                samples=row.samples,
                options=spec.inputs,
            )
            judging = (pointer, row.arrays)  # the validation data; without it, the rest of the calibration data
        check_metric(spec.validation.metric, *judging, source.outputs)

    def get(self, tenant_id: str, job_id: str) -> Job:
        with self.db.read() as session:
            job = JobRepository(session).get(tenant_id, job_id)
        if job is None:
            raise not_found("job", job_id)
        return job

    def children(self, tenant_id: str, job_id: str) -> Sequence[Job]:
        """The jobs of one that compares targets, in the order of these."""
        with self.db.read() as session:
            return JobRepository(session).of_parent(tenant_id, job_id)

    def version(self, tenant_id: str, job_id: str) -> int:
        """Of the job as clients see it; far cheaper than the job."""
        with self.db.read() as session:
            version = JobRepository(session).version(tenant_id, job_id)
        if version is None:
            raise not_found("job", job_id)
        return version

    def list(
        self, tenant_id: str, *, limit: int, before: str | None, status: str | None, model_id: str | None
    ) -> list[Job]:
        with self.db.read() as session:
            return JobRepository(session).page(tenant_id, limit=limit, before=before, status=status, model_id=model_id)

    def cancel(self, tenant_id: str, job_id: str) -> Job:
        """End a queued job now; ask the worker of a running one to stop. A job that has ended stays as it is. One that
        compares targets ends with its own jobs, of which each is cancelled."""
        with self.db.write() as uow:
            jobs = JobRepository(uow.session)
            job = jobs.get(tenant_id, job_id)
            if job is None:
                raise not_found("job", job_id)
            # First the locks of its children, where it has some: locks go from children to parents.
            children = jobs.children(job_id, lock=True) if job.queue == PARENTS else []
            if children:
                states = [(job_id, JobStatus.RUNNING), *((child.id, JobStatus(child.status)) for child in children)]
            else:
                states = [(job_id, JobStatus(job.status))]
            done = [_ask_to_cancel(jobs, *state) for state in states]
            if any(done):
                record(uow.session, tenant_id, current_actor(), "job.cancel", job_id, {"status": job.status})
            return uow.session.get_one(Job, job_id, populate_existing=True)

    def delete(self, tenant_id: str, job_id: str, *, engines: bool = False) -> None:
        """Remove a job that has ended, its events, report and manifest, with `engines` also these. One that compares
        targets goes with its jobs; one of these goes with it only."""
        with self.db.write() as uow:
            job = JobRepository(uow.session).get(tenant_id, job_id)
            if job is None:
                raise not_found("job", job_id)
            if job.parent_id is not None:
                remedy = f"Delete job {job.parent_id}: this one goes with it."
                raise conflict("in_use", f"The job is one of those that job {job.parent_id} compares.", remedy)
            gone = remove_jobs(uow.session, tenant_id, [job_id], engines=engines)
            record(uow.session, tenant_id, current_actor(), "job.delete", job_id, {"engines": engines})
            if not gone.job_ids:
                remedy = f"Cancel it first: POST /v1/jobs/{job_id}/cancel, and wait for its end."
                raise conflict("job_active", f"The job is {job.status}.", remedy)
        release(self.db, self.content, tenant_id, gone.digests)

    def events_after(self, tenant_id: str, job_id: str, seq: int, limit: int = 500) -> Sequence[JobEvent]:
        with self.db.read() as session:
            jobs = JobRepository(session)
            if jobs.version(tenant_id, job_id) is None:
                raise not_found("job", job_id)
            return jobs.events_after(job_id, seq, limit)

    def versions(self, job_ids: Collection[str]) -> dict[str, int]:
        with self.db.read() as session:
            return JobRepository(session).versions(job_ids)


def _ask_to_cancel(jobs: JobRepository, job_id: str, status: JobStatus) -> bool:
    """Whether that changed anything: not for a job that has ended, or was asked before."""
    asked: dict[str, Any] = {"cancel_requested_at": utcnow()}
    running = [Job.status == JobStatus.RUNNING.value, Job.cancel_requested_at.is_(None)]
    # Twice: a worker may take the job, or give it back, between the two statements.
    for _ in range(2 if status not in TERMINAL else 0):
        if jobs.apply(job_id, Trigger.CANCEL, source=JobStatus.QUEUED, values=asked) is not None:
            return True
        if jobs.update(job_id, running, asked, "note", {"message": "cancel requested"}) is not None:
            return True
    return False


def _queued(
    job_id: str,
    spec: OptimizationSpec,
    queue: Queue,
    parent: Job | None,
    *,
    origin: Origin,
) -> Job:
    now = utcnow()
    return Job(
        id=job_id,
        tenant_id=origin.tenant_id,
        model_id=spec.model_id,
        status=JobStatus.QUEUED.value,
        stage=None,
        progress=0.0,
        spec=stored(spec),
        priority=spec.priority,
        turn=turn_of(spec.priority),
        start_by=None if spec.max_queue_seconds is None else now + timedelta(seconds=spec.max_queue_seconds),
        queue=queue.name,
        stages=queue.stages,
        error=None,
        engine_ids=[],
        correlation_id=origin.correlation_id,
        traceparent=origin.traceparent,
        actor=as_stored(origin.actor),
        webhook_url=spec.webhook.url if spec.webhook else None,
        webhook_attempts=0,
        version=1,
        attempts=0,
        fencing_token=0,
        created_at=now,
        parent_id=None if parent is None else parent.id,
    )


def _running(parent: Job) -> Job:
    """One that compares targets is never queued: no worker takes it."""
    parent.status, parent.stage, parent.started_at = JobStatus.RUNNING.value, "target", parent.created_at
    return parent
