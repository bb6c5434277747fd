"""A process that looks into uploaded files, one at a time, until its input ends: `python -m app.inspection.child`.

Requests and answers are lines of JSON on stdin and stdout. It imports the parsers and nothing else, holds no secret,
and its limits on memory and CPU time are the kernel's: whoever hits them dies, and the pool says so to the client.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from app.datasets.inspect import describe_dataset
from app.errors import AppError
from app.source_models.inspect import describe_model

_KINDS = {"model": describe_model, "data set": describe_dataset}


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(5)  # whoever answers short requests goes first
    requests: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(requests,), daemon=True).start()
    while True:
        answer = json.dumps(_answer(json.loads(requests.get())))
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _receive(requests: SimpleQueue[bytes]) -> None:
    """Ends the process as soon as the pool is gone, in the middle of a file too, and where it can take nothing more."""
    try:
        for line in sys.stdin.buffer:
            requests.put(line)
    finally:
        os._exit(0)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    _limit(request["cpu_s"], request["memory_bytes"])
    limits = SimpleNamespace(**request["limits"])
    try:
        return {"columns": _KINDS[request["kind"]](Path(request["path"]), request["filename"], limits)}
    except AppError as error:
        return {"error": {**vars(error), "errors": []}}
    except MemoryError:
        return {"limit": "memory"}


def _limit(cpu_s: float, memory_bytes: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + cpu_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main()
