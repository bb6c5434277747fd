"""The application's parts, made once at start-up and handed to the routes."""

from __future__ import annotations

from dataclasses import dataclass

from anyio import CapacityLimiter

from app.artifacts.service import EngineService
from app.capabilities.service import CapabilityService
from app.datasets.service import DatasetService
from app.db.uow import Database
from app.http.auth import Authenticator
from app.http.metrics import Metrics
from app.jobs.documents import JobDocuments
from app.jobs.service import JobService
from app.jobs.watcher import JobWatcher
from app.settings import Settings
from app.source_models.service import SourceModelService
from app.storage.content import ContentStore
from app.uploads.service import UploadService


@dataclass(frozen=True)
class Services:
    """`files` limits threads that move or read files, `inspections` those that look into uploads: neither may take
    the threads that answer short requests."""

    settings: Settings
    db: Database
    content: ContentStore
    auth: Authenticator
    metrics: Metrics
    models: SourceModelService
    datasets: DatasetService
    uploads: UploadService
    jobs: JobService
    job_documents: JobDocuments
    engines: EngineService
    capabilities: CapabilityService
    watcher: JobWatcher
    files: CapacityLimiter
    inspections: CapacityLimiter
