"""The API: wiring only. Nothing connects at import; the parts are made when the application starts."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio.to_thread
import structlog
from anyio import CapacityLimiter
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from app.artifacts import endpoints as artifacts
from app.artifacts.service import EngineService
from app.background import Background
from app.blobs.content import ContentStore
from app.blobs.retention import Policies
from app.capabilities import endpoints as capabilities
from app.capabilities.service import CapabilityService
from app.compatibility.service import CompatibilityService
from app.datasets import endpoints as datasets
from app.datasets.service import DatasetService
from app.db.base import make_engine
from app.db.uow import Database
from app.http import health
from app.http.auth import Authenticator, TokenCaller
from app.http.ending import Ending
from app.http.metrics import Metrics
from app.http.middleware import BodyLimitMiddleware, KeyMiddleware, LocalGuardMiddleware, RequestContextMiddleware
from app.http.openapi import describe
from app.http.problem import install_handlers, problems
from app.http.rates import Rates
from app.http.services import Services
from app.http.threads import Places, SharedReads, SharedThreads
from app.inspection.pool import Inspector
from app.jobs import endpoints as jobs
from app.jobs.documents import JobDocuments
from app.jobs.outlook import Outlooks
from app.jobs.service import JobService
from app.jobs.sweep import end_overdue
from app.jobs.watcher import JobWatcher
from app.oidc import endpoints as oidc
from app.operations.tracing import NO_TRACING, make_tracing
from app.operators import endpoints as operators
from app.queue.producer import Dispatch, make_dispatch
from app.scratch import remove_stale
from app.settings import Settings, load_settings
from app.source_models import endpoints as source_models
from app.source_models.service import SourceModelService
from app.storage.factory import make_store
from app.tenants import endpoints as tenants
from app.tenants.keys import KeyService
from app.tenants.service import TenantService
from app.uploads import endpoints as uploads
from app.uploads.service import UploadService
from app.web.pages import add_pages
from app.webhooks import endpoints as webhooks
from app.webhooks.service import WebhookService

if TYPE_CHECKING:
    from app.oidc.provider import Provider
    from app.oidc.sign_in import SignIn

log = structlog.get_logger(__name__)

VERSION = "0.1.0"
_CLEAN_S = 5.0
_OVERDUE_S = 2.0


def create_app(settings: Settings | None = None, *, dispatch: Dispatch | None = None) -> FastAPI:
    """The ASGI application. `dispatch` sends a queued job to the workers; the default one uses the broker."""
    settings = settings or load_settings()
    metrics = Metrics()
    background = Background()
    ending = Ending()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = make_services(settings, metrics, dispatch or make_dispatch(settings))
        metrics.watch(health.CachedSnapshot(lambda: health.snapshot(services)))
        app.state.services = services
        app.state.tracing = tracing = make_tracing(settings, "anneal-api", f"{socket.gethostname()}-{os.getpid()}")
        app.state.readiness = health.CachedReadiness(health.Examiner(health.probes_of(services, background, ending)))
        ending.stop_waiting = services.watcher.close
        background.keep("job-watcher", services.watcher.run)
        background.keep("cleaner", lambda: _clean(settings.temp_dir))
        background.keep("queue times", lambda: _end_overdue(services.db))
        background.keep("key-uses", services.auth.uses.run)
        if services.provider is not None:
            background.keep("identity-provider", services.provider.run)
        try:
            yield
        finally:
            services.uploads.stop()
            await background.stop()
            await services.auth.uses.write()
            await services.rates.close()
            services.watcher.close()
            services.inspector.close()
            services.db.close()
            await anyio.to_thread.run_sync(tracing.close)

    app = FastAPI(title="Anneal", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.background = background
    app.state.ending = ending
    app.state.tracing = NO_TRACING
    install_handlers(app)
    # Routes are tried in order: jobs, which are polled, come first.
    for module in (jobs, source_models, datasets, uploads, artifacts, capabilities, webhooks, tenants, operators):
        app.include_router(module.router, prefix="/v1", responses=problems(401, 403, 421, 422, 429, 500, 503))
    app.include_router(health.router)
    app.include_router(oidc.router)
    add_pages(app)
    app.webhooks.include_router(webhooks.webhooks)
    describe(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimitMiddleware, limit=settings.limits.json_bytes)
    app.add_middleware(KeyMiddleware)
    if not settings.keys_required:
        app.add_middleware(LocalGuardMiddleware)
    app.add_middleware(RequestContextMiddleware, metrics=metrics)
    return app


async def _clean(temp_dir: Path) -> None:
    """Now and then removes what API processes that were killed have left in the scratch folder."""
    while True:
        await anyio.to_thread.run_sync(remove_stale, temp_dir)
        await asyncio.sleep(_CLEAN_S)


async def _end_overdue(db: Database) -> None:
    """Ends jobs that waited too long. Workers do that, too; but where none lives, jobs wait too long."""
    while True:
        await asyncio.sleep(_OVERDUE_S)
        try:
            await anyio.to_thread.run_sync(end_overdue, db)
        except SQLAlchemyError as error:  # the database is away
            log.warning("could_not_end_overdue_jobs", error=str(error)[:200])


def make_services(settings: Settings, metrics: Metrics, dispatch: Dispatch) -> Services:
    """Every part of the API. The database is connected to on first use."""
    db = Database(make_engine(settings.database))
    content = ContentStore(make_store(settings))
    reads, rates = SharedReads(), Rates(settings.broker)
    policies = Policies(db, settings)
    inspector = Inspector(settings.limits, scratch=settings.temp_dir, hidden=settings.hidden)
    capability_service = CapabilityService(db, settings)
    jobs_service = JobService(db, content, dispatch, settings)
    provider, of_token, sign_in = make_oidc(db, settings, reads)
    return Services(
        settings=settings,
        db=db,
        content=content,
        auth=Authenticator(db, settings, reads, rates, of_token),
        rates=rates,
        tenants=TenantService(db, settings.limits),
        keys=KeyService(db),
        metrics=metrics,
        models=SourceModelService(db, content, settings, inspector),
        datasets=DatasetService(db, content, settings, inspector),
        uploads=UploadService(db, content, settings),
        jobs=jobs_service,
        job_documents=JobDocuments(jobs_service, Outlooks(db, capability_service), policies),
        policies=policies,
        engines=EngineService(db, content),
        capabilities=capability_service,
        compatibility=CompatibilityService(db, capability_service),
        webhooks=WebhookService(db, settings),
        watcher=JobWatcher(jobs_service.versions),
        files=CapacityLimiter(16),
        storage=SharedThreads(24, each=12, patience_s=10),
        creations=SharedThreads(32, each=8, patience_s=120),
        reads=SharedReads(threads=2),  # crowds come at once, and others are to get a word in
        waiting=Places(settings.limits.waiting_per_tenant),
        inspector=inspector,
        provider=provider,
        sign_in=sign_in,
    )


def make_oidc(
    db: Database, settings: Settings, reads: SharedReads
) -> tuple[Provider | None, TokenCaller | None, SignIn | None]:
    """What there is of an identity provider: itself, who asks with its tokens, how people sign in there."""
    wanted = settings.oidc
    if not wanted.issuer:
        return None, None, None
    # They need the extra `oidc`, which is looked for before (`app.supervisor`).
    from app.oidc.bearer import BearerTokens
    from app.oidc.provider import Provider
    from app.oidc.sign_in import SignIn

    provider = Provider(wanted.issuer)
    of_token = BearerTokens(db, wanted, provider, reads).caller if wanted.audience else None
    return provider, of_token, SignIn(db, settings, provider) if wanted.client_id else None
