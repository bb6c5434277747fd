"""The calls, once: both clients run them, over a blocking `Io` and over an event loop's."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlencode

import httpx

from anneal_client import engines
from anneal_client.answers import Answer, Manifest
from anneal_client.errors import AnnealError, InvalidRequest, JobFailed, Unauthorized
from anneal_client.events import TERMINAL, Event
from anneal_client.following import Followed
from anneal_client.io import Io
from anneal_client.models import Capabilities, Compatibility, Dataset, Engine, Job, Model, Readiness, WebhookSecret
from anneal_client.reports import Comparison, Report
from anneal_client.resuming import Note, note_of
from anneal_client.sources import Source, data_source, model_source
from anneal_client.transfer import COMPLETED, OPEN, PartedUpload, content_digest, download
from anneal_client.transport import Transport, parsed_base

A = TypeVar("A", bound=Answer)
Kind = Literal["models", "datasets"]
OnEvent = Callable[[Event], Any]

PARTS_ABOVE = 256 << 20
_PAGE = 100


class Core:
    """Every call as a coroutine, over one transport."""

    def __init__(
        self, base_url: str, api_key: str | None, make_io: Callable[[Mapping[str, str], float], Io], **options: Any
    ) -> None:
        url = parsed_base(base_url)
        if api_key and not _is_printable(api_key, " "):
            detail = "The API key holds spaces or characters that no key has."
            raise Unauthorized("invalid_key", detail, remedy="A key is one word (ank_…): copy it again.")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.http = Transport(url, make_io(headers, options["timeout_s"]), retries=options["retries"])
        # Whose uploads a note is about: not the key itself, which no file of the cache should tell.
        self._account = hashlib.sha256(f"{url}\0{api_key or ''}".encode()).hexdigest()

    async def get(self, kind: type[A], path: str, **options: Any) -> A:
        return await self.call(kind, "GET", path, **options)

    async def call(self, kind: type[A], method: str, path: str, **options: Any) -> A:
        return kind(_object(await self.http.request(method, path, **options)))

    async def delete(self, path: str, **params: str) -> None:
        await self.http.request("DELETE", path, params=params)

    async def delete_job(self, job_id: str, engines: bool) -> None:
        await self.delete(job_path(job_id), **({"engines": "true"} if engines else {}))

    async def listed(self, kind: type[A], path: str, filters: Mapping[str, str | None]) -> AsyncGenerator[A, None]:
        params = {name: value for name, value in filters.items() if value is not None} | {"limit": str(_PAGE)}
        while True:
            page = _object(await self.http.request("GET", path, params=params))
            for item in page["items"]:
                yield kind(item)
            if page["next_cursor"] is None:
                return
            params["cursor"] = page["next_cursor"]

    # Files in

    async def upload(
        self,
        kind: type[A],
        at: Kind,
        path: Path,
        name: str | None,
        *,
        parts_above: int = PARTS_ABOVE,
        workers: int = 4,
        upload_id: str | None = None,
    ) -> A:
        source = await self.http.io.call(model_source if at == "models" else data_source, path)
        name = name or source.name
        sha256 = await self.http.io.call(source.sha256)
        if upload_id is not None:
            parted = PartedUpload(self.http, source)
            upload_id = await parted.finish(await parted.state(upload_id), workers=workers)
            return await self._from_upload(kind, at, name, upload_id)
        if source.size > parts_above:
            with note_of(self._account, at, name, source.filename, str(source.size), sha256) as note:
                return await self._upload_in_parts(kind, at, name, source, sha256, note, workers)
        return await self.call(
            kind,
            "POST",
            f"/v1/{at}",
            params={"name": name, "filename": source.filename},
            headers={
                "Idempotency-Key": os.urandom(16).hex(),
                "Content-Type": "application/octet-stream",
                "Content-Length": str(source.size),
                "Content-Digest": content_digest(sha256),
            },
            body=lambda: source.blocks(0, source.size),
            timeout_s=600,
        )

    async def _upload_in_parts(
        self, kind: type[A], at: Kind, name: str, source: Source, sha256: str, note: Note, workers: int
    ) -> A:
        parted = PartedUpload(self.http, source)
        session: Mapping[str, Any] | None = None
        if note.upload_id is not None:
            try:
                session = await parted.state(note.upload_id)
            except AnnealError as error:
                if error.status is None or error.status >= 500:
                    raise
        if session is not None and session.get("status") == "consumed":
            try:  # made by a process that died before it heard of it
                made = await self._from_upload(kind, at, name, str(session["id"]))
            except AnnealError:
                session = None  # deleted since
            else:
                note.forget()
                return made
        if session is None or session.get("status") not in (OPEN, "completing", COMPLETED):
            session = await parted.begin(sha256)
            note.write(str(session["id"]))
        made = await self._from_upload(kind, at, name, await parted.finish(session, workers=workers))
        note.forget()
        return made

    async def _from_upload(self, kind: type[A], at: Kind, name: str, upload_id: str) -> A:
        body = {"name": name, "upload_id": upload_id}
        # Of the session, not random: a process that goes on after this one gets what this one made.
        key = {"Idempotency-Key": f"from-{upload_id}"}
        return await self.call(kind, "POST", f"/v1/{at}", json=body, headers=key, timeout_s=600)

    # Jobs

    async def submit(self, spec: Mapping[str, Any], idempotency_key: str | None) -> Job:
        if idempotency_key is not None and not (_is_printable(idempotency_key) and 1 <= len(idempotency_key) <= 255):
            detail = f"{idempotency_key[:40]!r} is no Idempotency-Key: 1 to 255 printable characters of ASCII."
            raise InvalidRequest(
                "invalid_idempotency_key", detail, remedy="Use a UUID, or a hash of what it stands for."
            )
        headers = {"Idempotency-Key": idempotency_key or os.urandom(16).hex()}
        return await self.call(Job, "POST", "/v1/jobs", json=dict(spec), headers=headers)

    async def job(self, job_id: str) -> Job:
        return await self.get(Job, job_path(job_id))

    def events(
        self, job_id: str, last_event_id: str | None = None, timeout_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        return Followed(self.http, job_id, last_event_id, timeout_s).events()

    async def wait(
        self, job_id: str, on_event: Callable[[Event], Awaitable[None]], *, check: bool, timeout_s: float | None
    ) -> Job:
        async with aclosing(self.events(job_id, timeout_s=timeout_s)) as events:
            async for event in events:
                await on_event(event)
        job = await self.job(job_id)
        if check and job.status != "succeeded":
            raise JobFailed(job)
        return job

    async def report(self, job_id: str) -> Report:
        return await self.get(Report, f"{job_path(job_id)}/report", headers={"Accept": "application/json"})

    async def report_page(self, job_id: str) -> str:
        return (await self.http.request("GET", f"{job_path(job_id)}/report", headers={"Accept": "text/html"})).text

    async def comparison(self, job_id: str) -> Comparison:
        return await self.get(Comparison, f"{job_path(job_id)}/report", headers={"Accept": "application/json"})

    async def manifest(self, job_id: str) -> Manifest:
        return await self.get(Manifest, f"{job_path(job_id)}/manifest")

    async def compatibility(self, model_id: str, timeout_s: float) -> Compatibility:
        deadline = time.monotonic() + timeout_s
        while True:
            found = await self.get(Compatibility, f"{path_of('models', model_id)}/compatibility")
            if found.status == "complete" or time.monotonic() > deadline:
                return found
            await self.http.io.sleep(0.5)

    async def capabilities(self) -> Capabilities:
        return await self.get(Capabilities, "/v1/capabilities")

    async def readiness(self) -> Readiness:
        # 503 is an answer here: what this process cannot do now.
        url = self.http.resolve("/readyz")

        async def once() -> httpx.Response:
            return await self.http.io.request(True, "GET", url)

        return Readiness(_object(await self.http.attempt(once)))

    # What came out

    async def engine(self, engine_id: str) -> Engine:
        return await self.get(Engine, path_of("engines", engine_id))

    async def download_engine(self, engine_id: str, path: Path) -> Path:
        sha256 = (await self.engine(engine_id)).get("sha256")
        return await download(self.http, f"{path_of('engines', engine_id)}/download", path, sha256)

    async def download_bundle(
        self, engine_id: str, path: Path, kind: str | None, then: str | None, connect: Mapping[str, str] | None
    ) -> Path:
        asked = [("kind", kind), ("then", then), *(("connect", f"{o}:{i}") for i, o in (connect or {}).items())]
        query = urlencode([(name, value) for name, value in asked if value])
        return await download(self.http, f"{path_of('engines', engine_id)}/bundle{query and '?'}{query}", path, None)

    async def download_file(self, at: Kind, resource_id: str, path: Path) -> Path:
        sha256 = (await self.get(Answer, path_of(at, resource_id))).get("sha256")
        return await download(self.http, f"{path_of(at, resource_id)}/download", path, sha256)

    async def load_engine(self, engine_id: str, threads: int | None) -> engines.LocalEngine:
        engine = await self.engine(engine_id)
        folder = engines.folder_of(engine.bundle_sha256)
        if not await self.http.io.call(engines.is_whole, folder):
            archive = folder.with_name(f"{folder.name}.zip")
            url = f"{path_of('engines', engine_id)}/bundle"
            await download(self.http, url, archive, engine.bundle_sha256)
            try:
                await self.http.io.call(engines.unpack, archive, folder)
            finally:
                archive.unlink(missing_ok=True)
        return await self.http.io.call(engines.load_bundle, folder, threads=threads)

    # Who is told

    async def create_webhook(self, url: str, events: Sequence[str] | None, description: str) -> WebhookSecret:
        body = {"url": url, "events": None if events is None else list(events), "description": description}
        headers = {"Idempotency-Key": os.urandom(16).hex()}
        made = await self.call(WebhookSecret, "POST", "/v1/webhooks", json=body, headers=headers)
        # Without one, the answer that had the secret was lost, and the request repeated: nobody has it.
        return made if made.secret else await self.rotate_webhook_secret(made.id, 0)

    async def rotate_webhook_secret(self, webhook_id: str, overlap_seconds: int) -> WebhookSecret:
        body = {"overlap_seconds": overlap_seconds}
        return await self.call(WebhookSecret, "POST", f"{path_of('webhooks', webhook_id)}/rotate", json=body)

    # All of it

    async def given(self, kind: type[A], at: Kind, what: Any, name: str | None = None) -> str:
        """The id of a model or data set: of an answer, an id, or a file, which is uploaded."""
        if isinstance(what, Mapping):
            if "id" not in what:
                raise TypeError(f"{at}: a mapping without an id; arrays go through anneal_client.data.from_arrays")
            return str(what["id"])
        prefix = "mdl_" if at == "models" else "dst_"
        if isinstance(what, str) and what.startswith(prefix) and not await self.http.io.call(Path(what).exists):
            return what
        made = await self.upload(kind, at, Path(os.fspath(what)), name)
        return str(made["id"])

    async def prepared(self, model: Any, data: Any, calibration: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
        """The spec of a job on `model`, with what `data` and `calibration` are; models of a chain are given
        likewise."""
        wanted: dict[str, Any] = {**spec, "model_id": await self.given(Model, "models", model)}
        if chain := wanted.get("chain"):
            then = [{**link, "model_id": await self.given(Model, "models", link["model_id"])} for link in chain["then"]]
            wanted["chain"] = {**chain, "then": then}
        if data is not None:
            dataset_id = await self.given(Dataset, "datasets", data)
            wanted["validation"] = {**(wanted.get("validation") or {}), "dataset_id": dataset_id}
            if calibration is None:
                wanted["calibration"] = {"dataset_id": dataset_id, **(wanted.get("calibration") or {})}
            if axes := getattr(data, "inputs", None):
                wanted["inputs"] = {**axes, **(wanted.get("inputs") or {})}
        if calibration is not None:
            dataset_id = await self.given(Dataset, "datasets", calibration)
            wanted["calibration"] = {**(wanted.get("calibration") or {}), "dataset_id": dataset_id}
        return wanted


def path_of(at: str, resource_id: str) -> str:
    return f"/v1/{at}/{quote(resource_id, safe='')}"


def job_path(job_id: str) -> str:
    return path_of("jobs", job_id)


def has_ended(job: Mapping[str, Any]) -> bool:
    """Whether a job has come to its end, well or not."""
    return job.get("status") in TERMINAL


def _is_printable(text: str, *without: str) -> bool:
    """What a header carries as it is."""
    return text.isascii() and text.isprintable() and not any(c in text for c in without)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        detail = f"{response.request.url} answered {response.status_code} without a JSON object."
        raise AnnealError("unexpected_response", detail, status=response.status_code, remedy="Check the base URL.")
    return body
