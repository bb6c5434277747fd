"""Waits for a job's end without a worker's place. All that it knows is the connection's id and the job's, so that
another triggerer, or the same after a restart, goes on where this one stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import httpx
from airflow.sdk import BaseHook
from airflow.triggers.base import BaseTrigger, TriggerEvent

from anneal_airflow.hook import address

ENDED = frozenset({"succeeded", "failed", "cancelled"})
_LONG_POLL_S = 30
_PATIENCE_S = 600.0  # a service that restarts is waited for; one that is gone fails the task


class AnnealJobTrigger(BaseTrigger):
    """Fires once the job has ended: {job_id, status} or {job_id, error}. `poll_s`: least time between two questions."""

    def __init__(self, anneal_conn_id: str, job_id: str, poll_s: float = 1.0, patience_s: float = _PATIENCE_S) -> None:
        super().__init__()
        self.anneal_conn_id = anneal_conn_id
        self.job_id = job_id
        self.poll_s = poll_s
        self.patience_s = patience_s

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("anneal_conn_id", "job_id", "poll_s", "patience_s")
        return "anneal_airflow.trigger.AnnealJobTrigger", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        url, key = address(await BaseHook.aget_connection(self.anneal_conn_id))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = httpx.Timeout(10.0, read=_LONG_POLL_S + 30)
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout) as client:
            yield TriggerEvent({"job_id": self.job_id, **await self._end(client)})

    async def _end(self, client: httpx.AsyncClient) -> dict[str, str]:
        path = f"v1/jobs/{quote(self.job_id, safe='')}"
        silent_since: float | None = None
        clock = asyncio.get_running_loop().time
        wait = 0  # the first question is answered at once
        while True:
            started = clock()
            try:
                answer = await client.get(path, params={"wait": wait} if wait else None)
                problem = f"{answer.status_code} {answer.text[:300]}"
                if answer.status_code == httpx.codes.OK:
                    silent_since, wait = None, _LONG_POLL_S
                    if (status := answer.json()["status"]) in ENDED:
                        return {"status": status}
                elif answer.status_code < 500 and answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    return {"error": f"the service answered {problem}"}
                else:
                    silent_since = silent_since or started
            except httpx.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                silent_since = silent_since or started
            if silent_since is not None and clock() - silent_since > self.patience_s:
                return {"error": f"the service did not answer for {self.patience_s:.0f} s: {problem}"}
            await asyncio.sleep(max(0.0, self.poll_s - (clock() - started)) + (2.0 if silent_since else 0.0))
