"""The service as the commands ask it: the client, and the lists and pages that it has no call for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx

from anneal_client import Client
from anneal_client.cli.logins import Place
from anneal_client.errors import AnnealError, ConnectionFailed, error_from

Json = dict[str, Any]
_PAGE = 100
_TIMEOUT_S = 60.0


class Service:
    """Of one place; a context manager. `patient`: tries on while the service restarts, as who waits for a job wants."""

    def __init__(self, place: Place, *, patient: bool = False) -> None:
        self.place = place
        self.client = Client(place.url, place.key, retries=8 if patient else 2)
        headers = {"Authorization": f"Bearer {place.key}"} if place.key else {}
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT_S)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._http.close()

    def get(self, path: str, params: Mapping[str, str] | None = None) -> Json:
        """A JSON object. Raises AnnealError."""
        try:
            found = self._get(path, params, "application/json").json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            detail = f"{self.place.url}{path} did not answer with a JSON object."
            raise AnnealError("unexpected_response", detail, remedy="Is this the address of an Anneal service?")
        return found

    def page(self, path: str) -> str:
        """A page as HTML."""
        return self._get(path, None, "text/html").text

    def _get(self, path: str, params: Mapping[str, str] | None, accept: str) -> httpx.Response:
        try:
            response = self._http.get(self.place.url + path, params=params, headers={"Accept": accept})
        except httpx.TransportError as error:
            raise ConnectionFailed("connection_failed", str(error) or type(error).__name__) from error
        if response.status_code >= 400:
            raise error_from(response)
        return response

    def items(self, path: str, params: Mapping[str, str], most: int | None) -> Iterator[Json]:
        """Of a list, newest first; at most so many, or all."""
        cursor: str | None = None
        left = most
        while left is None or left > 0:
            limit = _PAGE if left is None else min(_PAGE, left)
            asked = {**params, "limit": str(limit), **({"cursor": cursor} if cursor else {})}
            answer = self.get(path, asked)
            found = [item for item in answer.get("items") or () if isinstance(item, dict)]
            yield from found[:left]
            left = None if left is None else left - len(found)
            cursor = answer.get("next_cursor")
            if not cursor:
                return
