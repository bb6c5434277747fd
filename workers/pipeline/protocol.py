"""What the worker and its child processes say to each other: one JSON object a line, or a datagram.

The path of a stage request goes worker → zygote (with the write end of a progress pipe), the zygote forks, the child
reports its progress through the pipe and leaves `result.json` in its workspace; the zygote tells how the child ended.
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
    """Of one stage call: wall seconds, private memory and size of any one file in bytes."""

    seconds: float
    memory_bytes: int
    file_bytes: int
    soft_seconds: float | None = None  # by which a stage that can stop earlier should


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

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decode(cls, raw: bytes) -> StageRequest:
        data = json.loads(raw)
        return cls(**{**data, "limits": Limits(**data["limits"])})


@dataclass(frozen=True)
class ChildEnd:
    """How a child ended: the status of `os.waitpid`, its peak resident memory and processor time."""

    wait_status: int
    max_rss_bytes: int
    cpu_seconds: float
