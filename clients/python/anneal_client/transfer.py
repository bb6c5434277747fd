"""Files in and out: streamed, verified, resumed. Memory stays flat in the size of the file."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from anneal_client.errors import AnnealError, DigestMismatch, UploadInterrupted
from anneal_client.sources import Source
from anneal_client.transport import Transient, Transport, raise_for_opened

MAX_LOOK_S = 5.0
OPEN = "open"
COMPLETED = "completed"
_WITHOUT_URLS = {"part_urls": "false"}
_SHA256 = re.compile(r"(?:sha-?256[:=-])?([0-9a-f]{64})", re.IGNORECASE)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_digest(sha256: str) -> str:
    """The `Content-Digest` header's value (RFC 9530)."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


class PartedUpload:
    """An upload session: parts in parallel, each retried; parts that are there already are not sent again."""

    def __init__(self, transport: Transport, source: Source) -> None:
        self._transport = transport
        self._source = source

    async def begin(self, sha256: str) -> Mapping[str, Any]:
        """A new session."""
        wanted = {"filename": self._source.filename, "size_bytes": self._source.size, "sha256": sha256}
        headers = {"Idempotency-Key": os.urandom(16).hex()}
        answer = await self._transport.request(
            "POST", "/v1/uploads", params=_WITHOUT_URLS, json=wanted, headers=headers
        )
        session: Mapping[str, Any] = answer.json()
        return session

    async def state(self, upload_id: str) -> Mapping[str, Any]:
        """The session as it stands."""
        answer = await self._transport.request("GET", f"/v1/uploads/{upload_id}", params=_WITHOUT_URLS)
        session: Mapping[str, Any] = answer.json()
        size = session.get("size_bytes", self._source.size)
        if size != self._source.size:
            detail = f"Upload {upload_id} is for {size} bytes, the file has {self._source.size}."
            raise AnnealError("upload_mismatch", detail)
        return session

    async def finish(self, session: Mapping[str, Any], *, workers: int) -> str:
        """Send what is missing and complete the session; answers its id. Raises `UploadInterrupted`, which can be
        resumed."""
        upload_id = str(session["id"])
        try:
            if session.get("status", OPEN) == OPEN:  # else completed by a call whose answer was lost
                await self._send_missing(session, workers)
            await self._complete(upload_id)
        except AnnealError as error:
            raise UploadInterrupted(upload_id, error) from error
        return upload_id

    async def _complete(self, upload_id: str) -> None:
        """Have the parts joined; where that takes long, look until it is done. Raises what was wrong with them."""
        path = f"/v1/uploads/{upload_id}"
        state: Mapping[str, Any] = (await self._transport.request("POST", f"{path}/complete")).json()
        looks = 0
        while state.get("status") == "completing":
            looks += 1
            await self._transport.io.sleep(min(MAX_LOOK_S, 0.2 * 2**looks))
            state = (await self._transport.request("GET", path, params=_WITHOUT_URLS)).json()
        if state.get("status", COMPLETED) not in (COMPLETED, "consumed"):
            # Joined and found wrong, or opened again for a part that has to be sent again: this says which.
            await self._transport.request("POST", f"{path}/complete")

    async def _part_url(self, upload_id: str, number: int) -> str:
        """Asked for when it is needed: it is good for a while only."""
        return str((await self._transport.request("GET", f"/v1/uploads/{upload_id}/parts/{number}")).json()["url"])

    async def _send_missing(self, session: Mapping[str, Any], workers: int) -> None:
        source, part_size = self._source, int(session["part_size"])
        urls: list[str] = session["part_urls"]  # of an earlier version of the service, which knows no other way
        there = {int(part["number"]) for part in session["received_parts"]}
        count = max(1, -(-source.size // part_size))

        async def send(number: int) -> None:
            start = (number - 1) * part_size
            length = min(part_size, source.size - start)
            await self._transport.request(
                "PUT",
                urls[number - 1] if urls else await self._part_url(str(session["id"]), number),
                headers={"Content-Length": str(length)},
                body=lambda: source.blocks(start, length),
                timeout_s=300,
            )

        missing = [partial(send, number) for number in range(1, count + 1) if number not in there]
        await self._transport.io.all(missing, workers)


async def download(transport: Transport, url: str, target: Path, sha256: str | None) -> Path:
    """Fetch `url` into `target`, which appears only when whole and verified. An interrupted download goes on where it
    stopped, within the call and (where `sha256` is known beforehand) in a later call too.

    The digest is `sha256`, or else the one in the response's ETag. Raises `DigestMismatch`.
    """
    part = await transport.io.call(_part_of, target, sha256)
    stated: list[str] = [sha256] if sha256 else []
    await transport.attempt(lambda: _fetch(transport, url, part, stated))
    found = await transport.io.call(sha256_of, part)
    if stated and found != stated[0]:
        part.unlink()
        raise DigestMismatch("digest_mismatch", f"{url} came as sha256 {found}, stated was {stated[0]}.")
    part.replace(target)
    return target


def _part_of(target: Path, sha256: str | None) -> Path:
    """Where the bytes gather; in a folder that is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{sha256[:16] if sha256 else 'partial'}.part")
    if sha256 is None:
        part.unlink(missing_ok=True)
    return part


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


async def _fetch(transport: Transport, path: str, part: Path, stated: list[str]) -> None:
    """One attempt: append what is missing to `part`. Notes the digest of the first answer's ETag in `stated`."""
    have = await transport.io.call(_size, part)
    url = transport.resolve(path)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    own = transport.is_own(url)
    async with transport.io.stream(own, "GET", url, headers=headers, follow_redirects=True) as opened:
        response = opened.response
        if have and response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if response.headers.get("Content-Range") == f"bytes */{have}":
                return  # all of it was there already
            await transport.io.call(part.unlink)
            raise Transient(AnnealError("range_not_satisfiable", f"{path} is not what was begun; starting over."))
        await raise_for_opened(opened)
        digest = next(filter(None, (etag_sha256(r) for r in (*response.history, response))), None)
        if digest and not stated:
            stated.append(digest)
        elif digest and digest != stated[0]:
            await transport.io.call(part.unlink, missing_ok=True)
            raise Transient(DigestMismatch("digest_mismatch", f"{path} changed while it was downloaded."))
        with part.open("ab" if response.status_code == httpx.codes.PARTIAL_CONTENT else "wb") as file:
            async with aclosing(opened.blocks()) as blocks:
                async for block in blocks:
                    await transport.io.call(file.write, block)


def etag_sha256(response: httpx.Response) -> str | None:
    """The SHA-256 in a strong ETag, or None where the ETag is something else (as S3's own)."""
    match = _SHA256.fullmatch(response.headers.get("ETag", "").strip('"'))
    return match.group(1).lower() if match else None
