"""The client for event loops: the calls of `client.Client`, over the same core."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from anneal_client.answers import Manifest
from anneal_client.client import Client
from anneal_client.core import Core, OnEvent, has_ended, job_path, path_of
from anneal_client.engines import LocalEngine
from anneal_client.events import Event
from anneal_client.io import LoopIo
from anneal_client.models import (
    Capabilities,
    Compatibility,
    Dataset,
    Engine,
    Job,
    Model,
    Readiness,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookMessage,
    WebhookSecret,
)
from anneal_client.reports import Comparison, Report
from anneal_client.requests import OptimizationSpec
from anneal_client.results import AsyncResult


class AsyncClient:
    """The calls of `Client`, for an event loop (asyncio or trio); tasks may share it. Iterators are asynchronous, and
    `on_event` may be a coroutine function. What a call means is said at `Client`, and in its docstring at run time.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout_s: float = 60.0, retries: int = 5) -> None:
        self._core = Core(base_url, api_key, LoopIo, timeout_s=timeout_s, retries=retries)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._core.http.io.close()

    # Files in

    async def upload_model(self, path: str | Path, name: str | None = None, **options: Any) -> Model:
        return await self._core.upload(Model, "models", Path(path), name, **options)

    async def upload_dataset(self, path: str | Path, name: str | None = None, **options: Any) -> Dataset:
        return await self._core.upload(Dataset, "datasets", Path(path), name, **options)

    # What is there

    async def model(self, model_id: str) -> Model:
        return await self._core.get(Model, path_of("models", model_id))

    def models(self, name: str | None = None) -> AsyncIterator[Model]:
        return self._core.listed(Model, "/v1/models", {"name": name})

    async def delete_model(self, model_id: str) -> None:
        await self._core.delete(path_of("models", model_id))

    async def download_model(self, model_id: str, path: str | Path) -> Path:
        return await self._core.download_file("models", model_id, Path(path))

    async def dataset(self, dataset_id: str) -> Dataset:
        return await self._core.get(Dataset, path_of("datasets", dataset_id))

    def datasets(self, name: str | None = None) -> AsyncIterator[Dataset]:
        return self._core.listed(Dataset, "/v1/datasets", {"name": name})

    async def delete_dataset(self, dataset_id: str) -> None:
        await self._core.delete(path_of("datasets", dataset_id))

    async def download_dataset(self, dataset_id: str, path: str | Path) -> Path:
        return await self._core.download_file("datasets", dataset_id, Path(path))

    async def compatibility(self, model_id: str, *, timeout_s: float = 60.0) -> Compatibility:
        return await self._core.compatibility(model_id, timeout_s)

    async def capabilities(self) -> Capabilities:
        return await self._core.capabilities()

    async def readiness(self) -> Readiness:
        return await self._core.readiness()

    # Jobs

    async def submit(
        self,
        spec: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[OptimizationSpec],
    ) -> Job:
        return await self._core.submit({**(spec or {}), **fields}, idempotency_key)

    async def job(self, job_id: str) -> Job:
        return await self._core.job(job_id)

    def jobs(self, *, status: str | None = None, model_id: str | None = None) -> AsyncIterator[Job]:
        return self._core.listed(Job, "/v1/jobs", {"status": status, "model_id": model_id})

    async def cancel(self, job_id: str) -> Job:
        return await self._core.call(Job, "POST", f"{job_path(job_id)}/cancel")

    async def delete_job(self, job_id: str, *, engines: bool = False) -> None:
        await self._core.delete_job(job_id, engines)

    def events(self, job_id: str, last_event_id: str | None = None) -> AsyncIterator[Event]:
        return self._core.events(job_id, last_event_id)

    async def wait(
        self,
        job_id: str,
        on_event: OnEvent | None = None,
        *,
        check: bool = True,
        timeout_s: float | None = None,
    ) -> Job:
        async def told(event: Event) -> None:
            if on_event is not None:
                done = on_event(event)
                if inspect.isawaitable(done):
                    await done

        return await self._core.wait(job_id, told, check=check, timeout_s=timeout_s)

    async def optimize(
        self,
        model: Any,
        data: Any = None,
        *,
        calibration_data: Any = None,
        on_event: OnEvent | None = None,
        timeout_s: float | None = None,
        **spec: Unpack[OptimizationSpec],
    ) -> AsyncResult:
        job = await self.submit(await self._core.prepared(model, data, calibration_data, spec))
        return await self.result(await self.wait(job.id, on_event, timeout_s=timeout_s))

    async def result(self, job: str | Mapping[str, Any]) -> AsyncResult:
        found = await self.job(job if isinstance(job, str) else str(job["id"]))
        return AsyncResult(self, found if has_ended(found) else await self.wait(found.id))

    # What came out

    async def report(self, job_id: str) -> Report:
        return await self._core.report(job_id)

    async def report_page(self, job_id: str) -> str:
        return await self._core.report_page(job_id)

    async def comparison(self, job_id: str) -> Comparison:
        return await self._core.comparison(job_id)

    async def manifest(self, job_id: str) -> Manifest:
        return await self._core.manifest(job_id)

    async def engine(self, engine_id: str) -> Engine:
        return await self._core.engine(engine_id)

    def engines(self, *, job_id: str | None = None, model_id: str | None = None) -> AsyncIterator[Engine]:
        return self._core.listed(Engine, "/v1/engines", {"job_id": job_id, "model_id": model_id})

    async def delete_engine(self, engine_id: str) -> None:
        await self._core.delete(path_of("engines", engine_id))

    async def download_engine(self, engine_id: str, path: str | Path) -> Path:
        return await self._core.download_engine(engine_id, Path(path))

    async def download_bundle(
        self,
        engine_id: str,
        path: str | Path,
        *,
        kind: str | None = None,
        then: str | None = None,
        connect: Mapping[str, str] | None = None,
    ) -> Path:
        return await self._core.download_bundle(engine_id, Path(path), kind, then, connect)

    async def load_engine(self, engine_id: str, *, threads: int | None = None) -> LocalEngine:
        return await self._core.load_engine(engine_id, threads)

    # Who is told

    async def create_webhook(
        self, url: str, *, events: Sequence[str] | None = None, description: str = ""
    ) -> WebhookSecret:
        return await self._core.create_webhook(url, events, description)

    def webhooks(self) -> AsyncIterator[WebhookEndpoint]:
        return self._core.listed(WebhookEndpoint, "/v1/webhooks", {})

    async def change_webhook(self, webhook_id: str, **changes: Any) -> WebhookEndpoint:
        return await self._core.call(WebhookEndpoint, "PATCH", path_of("webhooks", webhook_id), json=changes)

    async def delete_webhook(self, webhook_id: str) -> None:
        await self._core.delete(path_of("webhooks", webhook_id))

    async def rotate_webhook_secret(self, webhook_id: str, *, overlap_seconds: int = 86_400) -> WebhookSecret:
        return await self._core.rotate_webhook_secret(webhook_id, overlap_seconds)

    async def test_webhook(self, webhook_id: str) -> WebhookMessage:
        return await self._core.call(WebhookMessage, "POST", f"{path_of('webhooks', webhook_id)}/test")

    def deliveries(
        self, *, webhook_id: str | None = None, job_id: str | None = None, status: str | None = None
    ) -> AsyncIterator[WebhookDelivery]:
        filters = {"webhook_id": webhook_id, "job_id": job_id, "status": status}
        return self._core.listed(WebhookDelivery, "/v1/deliveries", filters)

    async def redeliver(self, delivery_id: str) -> WebhookMessage:
        return await self._core.call(WebhookMessage, "POST", f"{path_of('deliveries', delivery_id)}/redeliver")


for _name, _call in vars(AsyncClient).items():
    if inspect.isfunction(_call) and _call.__doc__ is None:
        _call.__doc__ = getattr(getattr(Client, _name, None), "__doc__", None)
