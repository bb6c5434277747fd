"""The synchronous client: upload, submit, watch, fetch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import httpx

from anneal_client.errors import AnnealError, JobFailed, error_from
from anneal_client.events import TERMINAL, Event, changes, parse_stream
from anneal_client.transfer import PartedUpload, blocks, content_digest, download, sha256_of
from anneal_client.transport import RETRIED_STATUS, Transport, pause, unreachable

Json = dict[str, Any]

LONG_POLL_S = 30
SILENCE_S = 60.0  # an event stream that says nothing for so long, not even a comment, is taken for dead


class Client:
    """A connection to one Anneal service; close it, or use it in a `with` block. Threads may share it.

    Calls block and answer the service's JSON as plain dicts. They are repeated, with backoff, up to `retries` times
    when the connection fails or the service says 429, 502, 503 or 504 (every creating call carries an
    Idempotency-Key, so nothing is made twice). Whatever else goes wrong is an `AnnealError`. Times are in seconds.
    """

    def __init__(self, base_url: str, api_key: str | None = None, *, timeout_s: float = 60.0, retries: int = 5) -> None:
        self._http = Transport(base_url, api_key, timeout_s=timeout_s, retries=retries)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # Files in

    def upload_model(self, path: str | Path, name: str | None = None, **options: Any) -> Json:
        """Upload an `.onnx`, a `.zip`/`.tar` of one with its external data, or a `.pt2`; answers the model.
        `options` are those of `upload_dataset`."""
        return self._upload("models", Path(path), name, **options)

    def upload_dataset(self, path: str | Path, name: str | None = None, **options: Any) -> Json:
        """Upload an `.npz` or a `.zip`/`.tar` of such shards; answers the data set.

        Options: `parts_above` (bytes, default 256 MiB): larger files go in parts, `workers` (4) of them at a time;
        `upload_id`: go on with an upload that was interrupted (`UploadInterrupted.upload_id`).
        """
        return self._upload("datasets", Path(path), name, **options)

    def _upload(
        self,
        kind: Literal["models", "datasets"],
        path: Path,
        name: str | None,
        *,
        parts_above: int = 256 << 20,
        workers: int = 4,
        upload_id: str | None = None,
    ) -> Json:
        name = name or path.stem
        size = path.stat().st_size
        key = {"Idempotency-Key": os.urandom(16).hex()}
        if upload_id is not None or size > parts_above:
            upload_id = PartedUpload(self._http, path).run(upload_id, workers=workers)
            body = {"name": name, "upload_id": upload_id}
            return self._json("POST", f"/v1/{kind}", json=body, headers=key, timeout_s=600)
        return self._json(
            "POST",
            f"/v1/{kind}",
            params={"name": name, "filename": path.name},
            headers={
                **key,
                "Content-Type": "application/octet-stream",
                "Content-Length": str(size),
                "Content-Digest": content_digest(sha256_of(path)),
            },
            body=lambda: blocks(path, 0, size),
            timeout_s=600,
        )

    # Jobs

    def submit(
        self, spec: Mapping[str, Any] | None = None, *, idempotency_key: str | None = None, **fields: Any
    ) -> Json:
        """Submit an optimization job; answers it, queued. The spec is given as a mapping, as keywords, or both
        (keywords win). The same `idempotency_key` and spec answer the same job."""
        headers = {"Idempotency-Key": idempotency_key or os.urandom(16).hex()}
        return self._json("POST", "/v1/jobs", json={**(spec or {}), **fields}, headers=headers)

    def job(self, job_id: str) -> Json:
        """The job as it stands."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}")

    def cancel(self, job_id: str) -> Json:
        """Ask for the job's end; answers it. No error where it has ended already."""
        return self._json("POST", f"/v1/jobs/{quote(job_id, safe='')}/cancel")

    def events(self, job_id: str, last_event_id: str | None = None) -> Iterator[Event]:
        """What happens to the job, from its beginning (or after `last_event_id`) to its end.

        Read from the event stream, which is resumed where it breaks; where no stream gets through (a proxy that
        buffers), events are made of the differences between long polls.
        """
        url = self._http.resolve(f"/v1/jobs/{quote(job_id, safe='')}/events")
        failures = 0
        while failures <= self._http.retries:
            headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
            if last_event_id is not None:
                headers["Last-Event-ID"] = last_event_id
            error: AnnealError | None = None
            try:
                timeout = httpx.Timeout(10.0, read=SILENCE_S)
                with self._http.client_for(url).stream("GET", url, headers=headers, timeout=timeout) as response:
                    if not _is_stream(response):
                        if response.status_code not in RETRIED_STATUS:
                            break
                        response.read()
                        error = error_from(response)
                    else:
                        for event in parse_stream(response.iter_lines()):
                            failures, last_event_id = 0, event.id or last_event_id
                            yield event
                            if event.terminal:
                                return
            except httpx.TransportError as broken:
                error = unreachable(broken)
            if error is None and self.job(job_id)["status"] in TERMINAL:
                break  # ended without saying so in the stream: the poll below tells the end
            failures += 1
            pause(failures)
        yield from self._polled_events(job_id)

    def _polled_events(self, job_id: str) -> Iterator[Event]:
        path = f"/v1/jobs/{quote(job_id, safe='')}"
        before: Json = {}
        headers: dict[str, str] = {}
        while before.get("status") not in TERMINAL:
            params = {"wait": str(LONG_POLL_S)} if before else None
            started = time.monotonic()
            response = self._http.request("GET", path, params=params, headers=headers, timeout_s=LONG_POLL_S + 30)
            if response.status_code != httpx.codes.NOT_MODIFIED:
                after = _object(response)
                yield from changes(before, after)
                before = after
                if etag := response.headers.get("ETag"):
                    headers["If-None-Match"] = etag
            if before.get("status") not in TERMINAL:
                time.sleep(max(0.0, 0.5 - (time.monotonic() - started)))  # a service that does not hold the poll

    def wait(self, job_id: str, on_event: Callable[[Event], None] | None = None, *, check: bool = True) -> Json:
        """Wait for the job's end and answer it; `on_event` sees every event on the way. Raises `JobFailed` where it
        did not succeed, unless `check` is False."""
        for event in self.events(job_id):
            if on_event is not None:
                on_event(event)
        job = self.job(job_id)
        if check and job["status"] != "succeeded":
            raise JobFailed(job)
        return job

    # What came out

    def report(self, job_id: str) -> Json:
        """The report of a job that succeeded."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}/report", headers={"Accept": "application/json"})

    def manifest(self, job_id: str) -> Json:
        """Inputs, stage keys, options, library versions and digests: enough to run the job again."""
        return self._json("GET", f"/v1/jobs/{quote(job_id, safe='')}/manifest")

    def engine(self, engine_id: str) -> Json:
        """What is known of an engine."""
        return self._json("GET", f"/v1/engines/{quote(engine_id, safe='')}")

    def download_engine(self, engine_id: str, path: str | Path) -> Path:
        """The engine's bytes into the file `path`, verified by SHA-256; an interrupted download is resumed."""
        sha256 = self.engine(engine_id).get("sha256")
        return download(self._http, f"/v1/engines/{quote(engine_id, safe='')}/download", Path(path), sha256)

    def download_bundle(self, engine_id: str, path: str | Path, *, kind: str | None = None) -> Path:
        """The deployment bundle (engine, manifest, `infer.py` in one archive) into the file `path`, verified. `kind`:
        "triton" for a .tar that is a model repository, "kserve" for one with manifests for Kubernetes."""
        query = f"?kind={quote(kind, safe='')}" if kind else ""
        return download(self._http, f"/v1/engines/{quote(engine_id, safe='')}/bundle{query}", Path(path), None)

    def compatibility(self, model_id: str, *, timeout_s: float = 60.0) -> Json:
        """Which backends take the model. Waits for the workers' answers, as long as `timeout_s`; what has not answered
        by then is `pending`."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = self._json("GET", f"/v1/models/{model_id}/compatibility")
            if found["status"] == "complete" or time.monotonic() > deadline:
                return found
            time.sleep(0.5)

    def capabilities(self) -> Json:
        """The live workers, their hardware, backends and versions."""
        return self._json("GET", "/v1/capabilities")

    def _json(self, method: str, path: str, **options: Any) -> Json:
        return _object(self._http.request(method, path, **options))


def _is_stream(response: httpx.Response) -> bool:
    kind = response.headers.get("Content-Type", "")
    return response.status_code == httpx.codes.OK and kind.startswith("text/event-stream")


def _object(response: httpx.Response) -> Json:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        detail = f"{response.request.url} answered {response.status_code} without a JSON object."
        raise AnnealError("unexpected_response", detail, status=response.status_code, remedy="Check the base URL.")
    return body
