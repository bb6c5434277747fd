"""What the worker and its child processes say to each other: one JSON object a line, or a datagram.

A `Call` (the path of a stage request and the call's number) goes worker → zygote, with the write end of a progress
pipe; the zygote forks and answers `Started`; the child reports its progress through the pipe and leaves `result.json`
in its workspace; the zygote tells how the child ended (`ChildEnd`). Both answers carry the call's number: what belongs
to another call is never taken for this one's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

REQUEST_FILE = "request.json"
RESULT_FILE = "result.json"
LOG_FILE = "stage.log"
MAX_DATAGRAM = 1 << 16


@dataclass(frozen=True)
class Limits:
    """Of one stage call: wall seconds, private memory in bytes, bytes of its files (of one and of all), processes."""

    seconds: float
    memory_bytes: int
    file_bytes: int
    soft_seconds: float | None = None  # by which a stage that can stop earlier should
    processes: int = 1024


@dataclass(frozen=True)
class StageRequest:
    """Paths are absolute; `inputs` maps a name to a folder."""

    stage: str
    options: dict[str, Any]
    inputs: dict[str, str]
    workspace: str
    outputs: str
    hardware: dict[str, Any]
    limits: Limits
    installation: dict[str, Any] = field(default_factory=dict)  # `workers.installation.Installation` as JSON
    kinds: dict[str, str] = field(default_factory=dict)  # what the inputs are, of those that a stage made

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes) -> StageRequest:
        data = json.loads(raw)
        return cls(**{**data, "limits": Limits(**data["limits"])})


@dataclass(frozen=True)
class Ready:
    """The zygote's first word: what it confines calls with (`app.sandbox.features.Features` as JSON)."""

    features: dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One call: its number, unlike that of every other of this worker, the file that holds the request, and how many
    processes it may have."""

    call: int
    path: str
    processes: int


@dataclass(frozen=True)
class Started:
    """The process of the call, leader of a process group of its own."""

    call: int
    pid: int


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended: the status of `os.waitpid`, its peak resident memory and processor time."""

    call: int
    wait_status: int
    max_rss_bytes: int
    cpu_seconds: float


def encode(message: Ready | Call | Started | ChildEnd) -> bytes:
    """One datagram."""
    return json.dumps(asdict(message)).encode()


def decode_ready(raw: bytes) -> Ready:
    """What the zygote says first. Raises ValueError or TypeError for anything else."""
    return Ready(**json.loads(raw))


def decode_answer(raw: bytes) -> Started | ChildEnd:
    """What the zygote says. Raises ValueError or TypeError for anything else."""
    fields = json.loads(raw)
    return Started(**fields) if "pid" in fields else ChildEnd(**fields)
