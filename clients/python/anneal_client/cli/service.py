"""The service as the commands ask it: the client, and where it asks."""

from __future__ import annotations

from types import TracebackType

from anneal_client import Client
from anneal_client.cli.logins import Place


class Service:
    """Of one place; a context manager. `patient`: tries on while the service restarts, as who waits for a job wants."""

    def __init__(self, place: Place, *, patient: bool = False) -> None:
        self.place = place
        self.client = Client(place.url, place.key, retries=8 if patient else 2)

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()

    def check_key(self) -> None:
        """Raises `Unauthorized` where the service wants another key, or one at all."""
        next(self.client.jobs(), None)
