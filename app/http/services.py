"""The application's parts, made once at start-up and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyio import CapacityLimiter

from app.artifacts.service import EngineService
from app.blobs.content import ContentStore
from app.blobs.retention import Policies
from app.capabilities.service import CapabilityService
from app.compatibility.service import CompatibilityService
from app.datasets.service import DatasetService
from app.db.uow import Database
from app.http.auth import Authenticator
from app.http.metrics import Metrics
from app.http.rates import Rates
from app.http.threads import Places, SharedReads, SharedThreads
from app.inspection.pool import Inspector
from app.jobs.documents import JobDocuments
from app.jobs.service import JobService
from app.jobs.watcher import JobWatcher
from app.settings import Settings
from app.source_models.service import SourceModelService
from app.tenants.keys import KeyService
from app.tenants.service import TenantService
from app.uploads.service import UploadService
from app.webhooks.service import WebhookService

if TYPE_CHECKING:
    from app.oidc.provider import Provider
    from app.oidc.sign_in import SignIn


@dataclass(frozen=True)
class Services:
    """`files` limits threads that read and write files on this machine's disk; `storage` are those that ask the
    storage, `creations` those that make a resource out of a file: none may take the threads that answer short requests.
    `reads` are what requests that wait for the same job share, in few threads, as hundreds of jobs may change at once;
    `waiting` counts these requests. `provider`: of identities, where one is set; `sign_in`: where people sign in."""

    settings: Settings
    db: Database
    content: ContentStore
    auth: Authenticator
    rates: Rates
    tenants: TenantService
    keys: KeyService
    metrics: Metrics
    models: SourceModelService
    datasets: DatasetService
    uploads: UploadService
    jobs: JobService
    job_documents: JobDocuments
    policies: Policies
    engines: EngineService
    capabilities: CapabilityService
    compatibility: CompatibilityService
    webhooks: WebhookService
    watcher: JobWatcher
    files: CapacityLimiter
    storage: SharedThreads
    creations: SharedThreads
    reads: SharedReads
    waiting: Places
    inspector: Inspector
    provider: Provider | None = None
    sign_in: SignIn | None = None
