"""The client whose calls block: upload, submit, watch, fetch. `aio.AsyncClient` has the same calls for event loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from anneal_client.answers import Manifest
from anneal_client.core import Core, has_ended, job_path, path_of
from anneal_client.engines import LocalEngine
from anneal_client.events import Event
from anneal_client.io import BlockingIo, iterate, run
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
from anneal_client.results import Result

Json = dict[str, Any]


class Client:
    """A connection to one Anneal service; close it, or use it in a `with` block. Threads may share it.

    Calls block and answer what the service says as dicts whose members are attributes too. They are repeated, with
    backoff, up to `retries` times when the connection fails or the service says 429, 502, 503 or 504 (every creating
    call carries an Idempotency-Key, so nothing is made twice). Whatever else goes wrong is an `AnnealError`. Times are
    in seconds.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout_s: float = 60.0, retries: int = 5) -> None:
        self._core = Core(base_url, api_key, BlockingIo, timeout_s=timeout_s, retries=retries)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        run(self._core.http.io.close())

    # Files in

    def upload_model(self, path: str | Path, name: str | None = None, **options: Any) -> Model:
        """Upload an `.onnx` (with the files beside it that hold its weights), a folder with one, a `.zip`/`.tar` of
        one, a `.pt2`, or what `from_torch` and its like return; answers the model. `options`: as `upload_dataset`."""
        return run(self._core.upload(Model, "models", Path(path), name, **options))

    def upload_dataset(self, path: str | Path, name: str | None = None, **options: Any) -> Dataset:
        """Upload an `.npz`, a folder or a `.zip`/`.tar` of such shards, or what `anneal_client.data` makes; answers the
        data set.

        Options: `parts_above` (bytes, default 256 MiB): larger files go in parts, `workers` (4) of them at a time. An
        upload in parts that was interrupted, even by the end of the process, goes on when the same file is uploaded
        again on this machine; elsewhere with `upload_id` (of `UploadInterrupted`).
        """
        return run(self._core.upload(Dataset, "datasets", Path(path), name, **options))

    # What is there

    def model(self, model_id: str) -> Model:
        """One model."""
        return run(self._core.get(Model, path_of("models", model_id)))

    def models(self, name: str | None = None) -> Iterator[Model]:
        """Models, newest first, as far as the iterator is followed."""
        return iterate(self._core.listed(Model, "/v1/models", {"name": name}))

    def delete_model(self, model_id: str) -> None:
        """Delete the model; its jobs, reports and engines stay."""
        run(self._core.delete(path_of("models", model_id)))

    def download_model(self, model_id: str, path: str | Path) -> Path:
        """The model's file, as it was uploaded, into the file `path`; verified, resumed."""
        return run(self._core.download_file("models", model_id, Path(path)))

    def dataset(self, dataset_id: str) -> Dataset:
        """One data set."""
        return run(self._core.get(Dataset, path_of("datasets", dataset_id)))

    def datasets(self, name: str | None = None) -> Iterator[Dataset]:
        """Data sets, newest first."""
        return iterate(self._core.listed(Dataset, "/v1/datasets", {"name": name}))

    def delete_dataset(self, dataset_id: str) -> None:
        """Delete the data set."""
        run(self._core.delete(path_of("datasets", dataset_id)))

    def download_dataset(self, dataset_id: str, path: str | Path) -> Path:
        """The data set's file into the file `path`; verified, resumed."""
        return run(self._core.download_file("datasets", dataset_id, Path(path)))

    def compatibility(self, model_id: str, *, timeout_s: float = 60.0) -> Compatibility:
        """Which backends take the model. Waits for the workers' answers, as long as `timeout_s`; what has not answered
        by then is `pending`."""
        return run(self._core.compatibility(model_id, timeout_s))

    def capabilities(self) -> Capabilities:
        """The live workers, their hardware, backends and versions."""
        return run(self._core.capabilities())

    def readiness(self) -> Readiness:
        """Whether the service can serve, and what it lacks."""
        return run(self._core.readiness())

    # Jobs

    def submit(
        self,
        spec: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: Unpack[OptimizationSpec],
    ) -> Job:
        """Submit an optimization job; answers it, queued. The spec is given as a mapping, as keywords, or both
        (keywords win). The same `idempotency_key` and spec answer the same job."""
        return run(self._core.submit({**(spec or {}), **fields}, idempotency_key))

    def job(self, job_id: str) -> Job:
        """The job as it stands."""
        return run(self._core.job(job_id))

    def jobs(self, *, status: str | None = None, model_id: str | None = None) -> Iterator[Job]:
        """Jobs, newest first."""
        return iterate(self._core.listed(Job, "/v1/jobs", {"status": status, "model_id": model_id}))

    def cancel(self, job_id: str) -> Job:
        """Ask for the job's end; answers it. No error where it has ended already."""
        return run(self._core.call(Job, "POST", f"{job_path(job_id)}/cancel"))

    def delete_job(self, job_id: str, *, engines: bool = False) -> None:
        """Delete a job that has ended, its report and its events; with `engines`, also what it delivered."""
        run(self._core.delete_job(job_id, engines))

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """What happens to the job, from its beginning (or after `last_event_id`) to its end.

        Read from the event stream, which is resumed where it breaks; where no stream gets through (a proxy that
        buffers), events are made of the differences between long polls.
        """
        return iterate(self._core.events(job_id, last_event_id))

    def wait(
        self,
        job_id: str,
        on_event: Callable[[Event], None] | None = None,
        *,
        check: bool = True,
        timeout_s: float | None = None,
    ) -> Job:
        """Wait for the job's end and answer it; `on_event` (as `Progress()`) sees every event on the way. Raises
        `JobFailed` where it did not succeed, unless `check` is False; `WaitTimeout` after `timeout_s`, the job going
        on."""

        async def told(event: Event) -> None:
            if on_event is not None:
                on_event(event)

        return run(self._core.wait(job_id, told, check=check, timeout_s=timeout_s))

    def optimize(
        self,
        model: Any,
        data: Any = None,
        *,
        calibration_data: Any = None,
        on_event: Callable[[Event], None] | None = None,
        timeout_s: float | None = None,
        **spec: Unpack[OptimizationSpec],
    ) -> Result:
        """Upload, submit and wait, in one; answers the job with its report and its engine.

        `model`, `data`: a file, what `from_torch` or `anneal_client.data` made, an answer, or an id. `data` judges the
        accuracy and calibrates (the service keeps these samples apart), unless `calibration_data` does. `spec`: as for
        `submit`; the models of a `chain` may be given as `model` is. Raises `JobFailed`, `WaitTimeout`.
        """
        job = self.submit(run(self._core.prepared(model, data, calibration_data, spec)))
        return self.result(self.wait(job.id, on_event, timeout_s=timeout_s))

    def result(self, job: str | Mapping[str, Any]) -> Result:
        """The job (or the one with this id), its report and its engine, once it has ended."""
        found = self.job(job if isinstance(job, str) else str(job["id"]))
        return Result(self, found if has_ended(found) else self.wait(found.id))

    # What came out

    def report(self, job_id: str) -> Report:
        """The report of a job that succeeded."""
        return run(self._core.report(job_id))

    def report_page(self, job_id: str) -> str:
        """The report as an HTML page."""
        return run(self._core.report_page(job_id))

    def comparison(self, job_id: str) -> Comparison:
        """The report of a job with `targets`: what its traffic costs on each."""
        return run(self._core.comparison(job_id))

    def manifest(self, job_id: str) -> Manifest:
        """Inputs, stage keys, options, library versions and digests: enough to run the job again."""
        return run(self._core.manifest(job_id))

    def engine(self, engine_id: str) -> Engine:
        """What is known of an engine."""
        return run(self._core.engine(engine_id))

    def engines(self, *, job_id: str | None = None, model_id: str | None = None) -> Iterator[Engine]:
        """Engines, newest first."""
        return iterate(self._core.listed(Engine, "/v1/engines", {"job_id": job_id, "model_id": model_id}))

    def delete_engine(self, engine_id: str) -> None:
        """Delete the engine and its bundle; its job and the report stay."""
        run(self._core.delete(path_of("engines", engine_id)))

    def download_engine(self, engine_id: str, path: str | Path) -> Path:
        """The engine's bytes into the file `path`, verified by SHA-256; an interrupted download is resumed."""
        return run(self._core.download_engine(engine_id, Path(path)))

    def download_bundle(
        self,
        engine_id: str,
        path: str | Path,
        *,
        kind: str | None = None,
        then: str | None = None,
        connect: Mapping[str, str] | None = None,
    ) -> Path:
        """The deployment bundle (engine, manifest, `infer.py` in one archive) into the file `path`, verified. `kind`:
        "triton" for a .tar that is a model repository, "kserve" for one with manifests for Kubernetes. `then`, with
        "triton": the id of an engine that what this one gives goes to; the repository holds both, and an ensemble of
        them. `connect`: {input of that one: output of this one}, where their names do not tell."""
        return run(self._core.download_bundle(engine_id, Path(path), kind, then, connect))

    def load_engine(self, engine_id: str, *, threads: int | None = None) -> LocalEngine:
        """The engine, ready to compute in this process: `engine(inputs)`. Its bundle is downloaded once and kept by its
        digest (`ANNEAL_CACHE`, else the user's cache folder); what is loaded is the bundle's `infer.py`, so use it with
        a service that you trust. `threads`: that compute, where it is not as many as were measured. Raises
        `EngineUnusable` (a library is missing, other hardware), with the command that helps."""
        return run(self._core.load_engine(engine_id, threads))

    # Who is told

    def create_webhook(self, url: str, *, events: Sequence[str] | None = None, description: str = "") -> WebhookSecret:
        """Have `url` told of the end of every job, or of these events ("job.succeeded", "job.failed", "job.cancelled").
        The answer has the secret that `verify_webhook` needs, this once."""
        return run(self._core.create_webhook(url, events, description))

    def webhooks(self) -> Iterator[WebhookEndpoint]:
        """The endpoints, newest first."""
        return iterate(self._core.listed(WebhookEndpoint, "/v1/webhooks", {}))

    def change_webhook(self, webhook_id: str, **changes: Any) -> WebhookEndpoint:
        """Change `url`, `events`, `description` or `enabled` of an endpoint."""
        return run(self._core.call(WebhookEndpoint, "PATCH", path_of("webhooks", webhook_id), json=changes))

    def delete_webhook(self, webhook_id: str) -> None:
        """Delete an endpoint; what waits for it is not sent."""
        run(self._core.delete(path_of("webhooks", webhook_id)))

    def rotate_webhook_secret(self, webhook_id: str, *, overlap_seconds: int = 86_400) -> WebhookSecret:
        """A new secret for an endpoint; the one of before signs beside it for so long."""
        return run(self._core.rotate_webhook_secret(webhook_id, overlap_seconds))

    def test_webhook(self, webhook_id: str) -> WebhookMessage:
        """Have an endpoint sent a message of type `webhook.test`."""
        return run(self._core.call(WebhookMessage, "POST", f"{path_of('webhooks', webhook_id)}/test"))

    def deliveries(
        self, *, webhook_id: str | None = None, job_id: str | None = None, status: str | None = None
    ) -> Iterator[WebhookDelivery]:
        """What was sent, or is to be ("pending", "delivered", "failed"); newest first."""
        filters = {"webhook_id": webhook_id, "job_id": job_id, "status": status}
        return iterate(self._core.listed(WebhookDelivery, "/v1/deliveries", filters))

    def redeliver(self, delivery_id: str) -> WebhookMessage:
        """Have it sent once more, now, under the same id."""
        return run(self._core.call(WebhookMessage, "POST", f"{path_of('deliveries', delivery_id)}/redeliver"))
