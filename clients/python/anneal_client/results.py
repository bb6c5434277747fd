"""What a job came to, in one object."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from anneal_client.engines import LocalEngine
from anneal_client.errors import EngineUnusable
from anneal_client.models import Job
from anneal_client.reports import Report

if TYPE_CHECKING:
    from anneal_client.aio import AsyncClient
    from anneal_client.client import Client


class Result:
    """A job that has ended. `report` and `engine` are fetched when they are first asked for."""

    def __init__(self, client: Client, job: Job) -> None:
        self._client = client
        self.job = job

    @cached_property
    def report(self) -> Report:
        """The job's report."""
        return self._client.report(self.job.id)

    @cached_property
    def engine(self) -> LocalEngine:
        """The engine, loaded in this process: `result.engine(inputs)`. Raises what `Client.load_engine` raises."""
        return self._client.load_engine(engine_of(self.job))

    def __repr__(self) -> str:
        return f"<result of {self.job.id}: {self.job.status}>"


class AsyncResult:
    """A job that has ended, of an `AsyncClient`."""

    def __init__(self, client: AsyncClient, job: Job) -> None:
        self._client = client
        self.job = job

    async def report(self) -> Report:
        """The job's report."""
        return await self._client.report(self.job.id)

    async def engine(self) -> LocalEngine:
        """The engine, loaded in this process; its calls block, as computing does."""
        return await self._client.load_engine(engine_of(self.job))

    def __repr__(self) -> str:
        return f"<result of {self.job.id}: {self.job.status}>"


def engine_of(job: Job) -> str:
    """The id of the engine that a job delivered. Raises `EngineUnusable`."""
    if not job.engine_ids:
        what = "compares others: ask one of its `children`" if job.children else f"is {job.status} and delivered none"
        raise EngineUnusable("no_engine", f"Job {job.id} {what}.")
    return job.engine_ids[0]
