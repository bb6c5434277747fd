"""Server-sent events, and the events that a change between two polled states of a job amounts to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: `type` is `state`, `stage`, `progress` or `note`; `id` resumes the stream."""

    type: str
    data: Mapping[str, Any] = field(default_factory=dict)
    id: str | None = None

    @property
    def terminal(self) -> bool:
        """Whether the job has ended with this event."""
        return self.type == "state" and self.data.get("status") in TERMINAL


class StreamParser:
    """A `text/event-stream` body, line by line (WHATWG HTML, section 9.2.6). Comments are left out; data that is not a
    JSON object comes as `{"message": <text>}`."""

    def __init__(self) -> None:
        self._kind, self._data = "", list[str]()
        self._last_id: str | None = None

    def feed(self, line: str) -> Event | None:
        """Take a line without its end; answers the event that it ends."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                self._kind = value
            elif name == "data":
                self._data.append(value)
            elif name == "id" and "\0" not in value:
                self._last_id = value
            return None
        event = Event(self._kind or "message", _decoded("\n".join(self._data)), self._last_id) if self._data else None
        self._kind, self._data = "", []
        return event


def parse_stream(lines: Iterable[str]) -> Iterator[Event]:
    """Events of a `text/event-stream` body, given line by line without line ends."""
    parser = StreamParser()
    yield from (event for line in lines if (event := parser.feed(line)) is not None)


def _decoded(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"message": text}


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Event]:
    """The events between two states of a job as `GET /v1/jobs/{id}` answers them; `before` may be empty.
    Used where no event stream gets through. A job's end comes last."""
    known = [_stage_event(stage) for stage in before.get("stages") or ()]
    for stage in after.get("stages") or ():
        event = _stage_event(stage)
        if event not in known:
            yield event
    if after.get("progress") != before.get("progress"):
        yield Event("progress", {"stage": after.get("stage"), "progress": after.get("progress")})
    if after.get("status") != before.get("status"):
        yield Event("state", {"status": after.get("status"), "error": after.get("error")})


def _stage_event(stage: Mapping[str, Any]) -> Event:
    names = ("candidate", "status", "cached", "seconds")
    return Event("stage", {"stage": stage.get("name"), **{name: stage.get(name) for name in names}})
