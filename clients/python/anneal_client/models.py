"""What the service answers. Made from openapi.json by `clients/python/generate.py`: do not edit."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from anneal_client.answers import Answer
from anneal_client.requests import OptimizationSpec


class Audit(Answer):
    """Something that was done."""

    action: str  # What is acted on, and how
    actor: str
    created_at: datetime
    detail: dict[str, Any]
    id: str
    resource: str | None  # Its id


class BackendCompatibility(
    Answer, defaults={"changes": [], "notes": [], "precisions": [], "refused": [], "refused_count": 0, "versions": {}}
):
    """What one backend says. `accepted` is null while the answer is pending, or where it could not be told."""

    accepted: bool | None
    answered_at: datetime | None
    changes: list[str]  # What to change, so that it is taken
    error: dict[str, Any] | None
    how: str | None  # What was done to find out
    name: str
    notes: list[str]
    precisions: list[Precision]
    refused: list[Refused]
    refused_count: int
    status: str
    versions: dict[str, str]


class Backend(Answer, defaults={"devices": [], "precisions": [], "versions": {}}):
    """An inference library of a worker, and the precisions that it gains by on that worker's hardware."""

    devices: list[str]
    name: str
    precisions: list[str]
    versions: dict[str, str]


class Capabilities(Answer):
    """What the live workers offer together, and each of them."""

    backends: list[str]
    devices: list[str]
    formats: list[str]
    hardware: list[str]  # Hardware ids that `target.hardware` of a job may name
    links: dict[str, str]
    precisions: list[str]
    workers: list[Worker]


class Check(Answer):
    detail: str
    ok: bool


class Child(Answer):
    """The job of one target of a job that compares several."""

    hardware: str | None
    id: str
    links: dict[str, str]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Compatibility(Answer):
    """Which backends take the model. `pending` until every backend that a live worker can ask has answered."""

    backends: list[BackendCompatibility]
    detail: str | None
    links: dict[str, str]
    model_id: str
    status: str


class Dataset(Answer):
    arrays: list[Tensor]  # The shape is that of one sample, without the first axis
    created_at: datetime
    expires_at: datetime | None
    filename: str
    format: str
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    samples: int
    sha256: str
    size_bytes: int


class Engine(Answer):
    backend: str
    bundle_filename: str
    bundle_sha256: str
    bundle_size_bytes: int
    created_at: datetime
    expires_at: datetime | None
    filename: str
    format: str
    hardware: dict[str, Any]  # What it was built and measured on
    id: str
    job_id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    metrics: dict[str, Any]
    model_id: str
    precision: str
    runtime: dict[str, Any]  # The options to load it with
    sha256: str
    size_bytes: int


class Health(Answer):
    status: str


class Isolation(Answer, defaults={"missing": []}):
    """What a worker confines models with. `missing`: what is open for want of something, in words."""

    landlock: int  # ABI of the kernel's Landlock, 0 = none
    missing: list[str]
    mode: str
    namespaces: bool
    network: str | None  # of stages: none, or open
    network_of_load_tests: str | None
    seccomp: bool


class JobEnded(Answer):
    """What webhooks are sent. Of a test, which an endpoint is sent on demand, the job is none."""

    job: JobNotice
    timestamp: datetime | None  # When it happened; that of the attempt is a header
    type: Literal["job.succeeded", "job.failed", "job.cancelled", "webhook.test"]


class JobError(Answer):
    """Why a job failed: what happened, where in the user's model, and what to do about it."""

    code: str
    detail: str
    node: str | None
    remedy: str | None
    stage: str | None
    tensor: str | None


class JobNotice(Answer):
    """What is told of a job where its spec and stages would be too much."""

    created_at: datetime
    engine_ids: list[str]
    error: JobError | None
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]


class Job(Answer, defaults={"children": []}):
    """A job."""

    cancel_requested: bool
    children: list[Child]  # Of a job with `targets`: one for each, in their order
    created_at: datetime
    engine_ids: list[str]
    error: JobError | None
    expected_end: datetime | None  # Of a running job, by its pace and its budget
    expires_at: datetime | None  # Of one that has ended: when retention deletes it
    finished_at: datetime | None
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    model_id: str
    parent_id: str | None  # The job that compares this one's target with others
    progress: float
    queue: Queue | None  # Of a queued job: what it can expect
    spec: OptimizationSpec
    stage: str | None  # The stage that runs now
    stages: list[Stage]
    started_at: datetime | None
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]


class KeyMade(Answer):
    """A new key. It is shown this once."""

    created_at: datetime
    expires_at: datetime | None
    id: str
    key: str
    last_used_at: datetime | None  # To within a minute
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    revoked_at: datetime | None
    role: Role


class Key(Answer):
    """A key as far as it is known: all but the key itself."""

    created_at: datetime
    expires_at: datetime | None
    id: str
    last_used_at: datetime | None  # To within a minute
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    revoked_at: datetime | None
    role: Role


class Limits(Answer):
    """Null: as much as the service itself takes (its `LIMIT_…` settings). 0 refuses all. What is smaller than what a
    tenant uses already takes nothing away: it blocks growth."""

    active_jobs: int | None  # Jobs that wait and run, together.
    gpu_seconds: int | None  # Seconds on GPUs by jobs of the last 30 days. A job that was begun goes on.
    model_bytes: int | None  # Bytes of one model.
    requests_per_minute: int | None  # Requests of the API and of pages.
    running_jobs: int | None  # Jobs that run at once; further ones wait.
    stored_bytes: int | None


class Model(Answer):
    created_at: datetime
    detail: dict[str, Any]
    expires_at: datetime | None
    filename: str
    format: str
    id: str
    inputs: list[Tensor]
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    opset: int | None
    outputs: list[Tensor]
    sha256: str
    size_bytes: int


class OperatorAudit(Answer):
    """Something that was done, and in whose name; null where that is not known."""

    action: str  # What is acted on, and how
    actor: str
    created_at: datetime
    detail: dict[str, Any]
    id: str
    resource: str | None  # Its id
    tenant_id: str | None


class OperatorKey(Answer):
    """A key, and whose."""

    created_at: datetime
    expires_at: datetime | None
    id: str
    last_used_at: datetime | None  # To within a minute
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    revoked_at: datetime | None
    role: Role
    tenant_id: str


class OperatorKeyMade(Answer):
    """A new key, and whose. It is shown this once."""

    created_at: datetime
    expires_at: datetime | None
    id: str
    key: str
    last_used_at: datetime | None  # To within a minute
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    revoked_at: datetime | None
    role: Role
    tenant_id: str


class Part(Answer):
    number: int
    size_bytes: int


class PartUrl(Answer):
    number: int
    size_bytes: int  # What the part must have, exactly
    url: str  # PUT it here; on S3 presigned


class PlanList(Answer):
    """All plans, by name."""

    plans: list[Plan]


class Plan(Answer):
    created_at: datetime
    limits: Limits
    name: str


class Plugin(Answer):
    """A backend or stage from another package. `problem`: why the worker cannot use it; null where it can."""

    distribution: str
    group: str
    name: str
    problem: str | None
    version: str


class Precision(Answer):
    """Whether something of the graph can be in this precision, and what the device must have for it."""

    admitted: bool
    how: str | None  # What was done to find out
    name: str
    needs: str | None
    reason: str | None


class Problem(Answer, defaults={"retryable": False}):
    """An error as RFC 9457 describes it. `code` is stable; texts may change. Further members may follow."""

    code: str  # Stable, snake_case
    detail: str
    errors: list[ProblemError] | None
    instance: str  # Path of the request
    node: str | None
    remedy: str | None
    request_id: str | None
    retryable: bool  # The same request may succeed later
    stage: str | None
    status: int
    tensor: str | None
    title: str
    type: str


class ProblemError(Answer):
    """One invalid field: JSON pointer (`/body/shapes/input/min`) and what is wrong with it."""

    message: str
    pointer: str


class Queue(Answer):
    """What a queued job can expect."""

    ahead: int | None
    expected_start: datetime | None
    position: int | None  # 1 is next, among the jobs that the same workers may take
    waiting_for: str | None  # Why no worker takes it now


class Readiness(Answer):
    """Whether this process can serve, and what the service as a whole lacks."""

    checks: dict[str, Check]
    missing: list[str]  # Names of the checks that failed
    ready: bool  # This process can serve; the answer's status is 200, else 503
    status: Literal["ready", "degraded", "unavailable"]  # `degraded`: it can serve, but not everything works


class Refused(Answer):
    """Something of the model that the backend does not take, and what to do about it."""

    code: str
    node: str | None
    op: str | None
    reason: str
    remedy: str | None
    tensor: str | None


class Requeued(Answer):
    jobs: list[str]  # Those that went back to the queue


class Retention(Answer):
    """Days until each kind expires; null: never."""

    datasets: int | None
    engines: int | None
    events: int | None
    jobs: int | None
    models: int | None
    results: int | None
    uploads: int | None


class Role(Answer):
    """`read`: look and download. `submit`: upload, run and cancel jobs, delete what is the tenant's. `admin`: the
    tenant's keys and its audit rows, too. `operator`: what `anneal-admin` does, of all tenants (`/v1/operator`); only
    the command line makes such a key."""

    pass


class SessionList(Answer):
    """Those that have not ended, newest first."""

    sessions: list[Session]


class Session(Answer):
    """A browser that somebody signed in with at the identity provider."""

    created_at: datetime
    expires_at: datetime
    name: str | None
    role: str
    subject: str
    tenant_id: str


class SessionsEnded(Answer):
    ended: int


class Stage(Answer, defaults={"cached": False}):
    """One stage of a job. `cached`: its result was there already, and it did not run."""

    cached: bool
    finished_at: datetime | None
    name: str
    started_at: datetime | None
    status: str


class Tenant(Answer):
    """Whose key or token this is, what it may do, and how much of the service is left."""

    created_at: datetime
    id: str
    key_expires_at: datetime | None
    key_id: str | None  # Of the key that asks; null where none is needed, and for a token
    limits: Limits
    links: dict[str, str]
    name: str
    plan: str
    role: Role  # Of the key or the token that asks
    subject: str | None
    usage: Usage


class TenantStanding(Answer):
    """A tenant, what holds for it, and what it uses."""

    created_at: datetime
    disabled_at: datetime | None
    id: str
    limits: Limits
    links: dict[str, str]  # Paths of this API that belong to the resource
    name: str
    own_limits: list[str]  # Names of those that are its own, not its plan's
    plan: str
    retention: Retention
    usage: Usage


class Tensor(Answer):
    """Lower-case dtype as ONNX names it (`float32`, `int64` …); a symbolic dimension is a string."""

    dtype: str
    name: str
    shape: list[int | str | None] | None


class UploadError(Answer):
    """Why the session was aborted by the service."""

    code: str
    detail: str
    remedy: str | None


class Upload(Answer):
    created_at: datetime
    error: UploadError | None
    expires_at: datetime
    filename: str
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    part_size: int  # Bytes of each part but the last
    part_urls: list[str]  # PUT part 1, 2, … to these; on S3 they are presigned and bypass the API
    parts: int  # How many parts there are to send
    received_parts: list[Part]
    sha256: str | None  # As declared; once completed, as computed
    size_bytes: int
    status: str


class Usage(Answer):
    """What stands against the limits."""

    gpu_seconds: float  # Of the last 30 days, running jobs included
    jobs_queued: int
    jobs_running: int
    stored_bytes: int
    upload_bytes: int  # What open upload sessions were declared with; it counts for `stored_bytes`


class WebhookDelivery(Answer):
    """A message to a receiver. Its id is the message's, `webhook-id`, in every attempt."""

    attempts: int
    created_at: datetime
    delivered_at: datetime | None
    event: str
    id: str
    job_id: str | None
    last_attempt_at: datetime | None
    last_error: str | None
    last_status: int | None  # Of the last attempt's answer; null where there was none
    links: dict[str, str]  # Paths of this API that belong to the resource
    next_attempt_at: datetime | None
    status: Literal["pending", "delivered", "failed"]
    url: str
    webhook_id: str | None  # The endpoint; null where the job named the URL


class WebhookEndpoint(Answer):
    """Where the service tells of events."""

    created_at: datetime
    description: str
    disabled_at: datetime | None
    disabled_reason: str | None  # Why the service disabled it; null where you did
    enabled: bool
    events: list[str] | None  # What it is told of; null: of everything
    failing_since: datetime | None  # No attempt since then was answered with 2xx
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    previous_secret_until: datetime | None  # Until then the secret of before signs, too
    url: str


class WebhookMessage(Answer):
    """A delivery with what it says."""

    attempts: int
    created_at: datetime
    delivered_at: datetime | None
    event: str
    id: str
    job_id: str | None
    last_attempt_at: datetime | None
    last_error: str | None
    last_status: int | None  # Of the last attempt's answer; null where there was none
    links: dict[str, str]  # Paths of this API that belong to the resource
    next_attempt_at: datetime | None
    payload: dict[str, Any]  # The body; what is signed are its bytes as they were sent
    status: Literal["pending", "delivered", "failed"]
    url: str
    webhook_id: str | None  # The endpoint; null where the job named the URL


class WebhookSecret(Answer):
    """An endpoint with its secret, which is shown this once."""

    created_at: datetime
    description: str
    disabled_at: datetime | None
    disabled_reason: str | None  # Why the service disabled it; null where you did
    enabled: bool
    events: list[str] | None  # What it is told of; null: of everything
    failing_since: datetime | None  # No attempt since then was answered with 2xx
    id: str
    links: dict[str, str]  # Paths of this API that belong to the resource
    previous_secret_until: datetime | None  # Until then the secret of before signs, too
    secret: str | None  # `whsec_…`; null where the request was repeated: rotate it, if you lost it
    url: str


class WorkerList(Answer):
    """Workers of the last 24 hours."""

    workers: list[WorkerState]


class Worker(Answer, defaults={"builds": {}, "examines": {}, "plugins": []}):
    backends: list[Backend]
    builds: dict[str, dict[str, list[str]]]
    examines: dict[str, str]  # Backends that it can ask what they take of a model: version
    formats: list[str]
    hardware: dict[str, Any]  # CPU model, ISA flags, cores, memory, GPU …, as the worker found it
    helps: str | None
    hostname: str
    id: str
    isolation: Isolation | None
    last_seen_at: datetime
    plugins: list[Plugin]
    queues: list[str]
    started_at: datetime


class WorkerState(Answer):
    hardware: str | None
    hostname: str
    id: str
    jobs: list[str]  # Those that it holds
    last_seen_at: datetime
    missing: list[str]  # What this machine lacks to keep untrusted models apart
    queues: list[str]
    state: Literal["live", "draining", "gone"]
