"""A search's requests as calls, JSON there and JSON back: for any process that has the job's model and data.

A call is named by what it asks. So it can be leased under that name, given on when whoever took it is lost, and done
twice: the second time its stage calls are answered from storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from app.domain.artifact_key import digest_of
from app.domain.failures import StageFailure
from workers.search import requests
from workers.search.requests import Answer, Request


class ForeignReply(Exception):
    """A reply to another call than the one that was made."""


@dataclass(frozen=True)
class Call:
    """`now`: seconds of the job's budget when it was made, which the request's `until` counts in, too; whoever executes
    it lets a budget go on from there."""

    request: Request
    now: float

    @property
    def id(self) -> str:
        """Hex SHA-256 of what is asked; the time at which that is, is no part of it."""
        return digest_of(requests.to_json(self.request))

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "request": requests.to_json(self.request), "now": self.now}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Call:
        """Raises ValueError where the id is not that of the request: it was changed, or cut."""
        found = cls(requests.from_json(data["request"]), data["now"])
        if found.id != data["id"]:
            raise ValueError(f"the call {data['id']} asks for something else: {found.id}")
        return found


def execute(call: Call, answer: Callable[[Request], Answer]) -> dict[str, Any]:
    """The reply. `answer`: `Desk.answer` of a desk that need not have answered anything before."""
    try:
        return {"id": call.id, "answer": dict(answer(call.request))}
    except StageFailure as failure:
        return {"id": call.id, "failure": failure.to_json()}


class Elsewhere:
    """Answers requests by calls that another process executes: for `driver.Search`. `send`: takes a call to one and
    brings its reply; `now`: seconds of the job's budget."""

    def __init__(self, send: Callable[[Mapping[str, Any]], Mapping[str, Any]], now: Callable[[], float]) -> None:
        self._send, self._now = send, now

    def __call__(self, request: Request) -> Answer:
        """Raises the StageFailure that ends the job, and `ForeignReply`."""
        call = Call(request, self._now())
        reply = self._send(call.to_json())
        if reply["id"] != call.id:
            raise ForeignReply(f"{reply['id']}, and {call.id} was asked")
        if "failure" in reply:
            raise StageFailure.from_json(dict(reply["failure"]))
        answer: Answer = reply["answer"]
        return answer
