"""A small pool of processes that look into uploaded files, so that no parser shares the API's event loop, its lock on
the interpreter or its memory. Started when first needed; one that dies is replaced."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import structlog

from app.errors import AppError
from app.sandbox.policy import Host
from app.settings import LimitSettings, child_environment

log = structlog.get_logger(__name__)

_ROOT = Path(__file__).resolve().parents[2]
_MOST_ANSWER_BYTES = 64 << 20
_FIELDS = frozenset(field.name for field in fields(AppError))
# What a file of this many bytes may take beyond the fixed time: to be unpacked where it is an archive, and hashed.
_BYTES_PER_CPU_SECOND = 10 << 20


class Inspector:
    """Threads share it. `inspect` blocks; one tenant never has all of its processes."""

    def __init__(
        self,
        limits: LimitSettings,
        processes: int | None = None,
        *,
        scratch: Path | None = None,
        hidden: Sequence[Path] = (),
    ) -> None:
        """`scratch`: where compressed parts of a file are unpacked for a moment; None: beside it. `hidden`: what no
        file is read from, wherever it lies (`Settings.hidden`)."""
        self._limits, self._scratch = limits, scratch
        self._host = Host(limits.inspect_sandbox, hidden=tuple(map(str, hidden)))
        self._most = processes or min(4, max(2, os.cpu_count() or 1))
        self._turn = threading.Condition()
        self._idle: list[_Child] = []
        self._busy: Counter[str] = Counter()
        self._children: set[_Child] = set()
        self._closed = False

    def inspect(self, tenant_id: str, kind: str, path: Path, filename: str) -> dict[str, Any]:
        """What a "model" or a "data set" says of itself, as columns of its row. Raises `AppError`: what is wrong with
        the file (422), or that it could not be looked into (503)."""
        limits = self._limits
        cpu_s = limits.inspect_cpu_s + path.stat().st_size / _BYTES_PER_CPU_SECOND
        request = {
            "kind": kind,
            "path": str(path.resolve()),
            "scratch": str((self._scratch or path.parent).resolve()),
            "filename": filename,
            "limits": {
                "unpacked_bytes": limits.unpacked_bytes,
                "archive_members": limits.archive_members,
                "compression_ratio": limits.compression_ratio,
            },
            "cpu_s": cpu_s,
            "memory_bytes": limits.inspect_memory_mb << 20,
        }
        with self._child(tenant_id) as child:
            # Time beyond CPU time: a slow disk, a machine that has much to do
            answer = child.ask(request, 60 + 4 * cpu_s)
        if answer is None:
            raise _unfinished(child.process.wait(), kind, filename)
        if "ended" in answer:
            raise _unfinished(answer["ended"], kind, filename)
        if "limit" in answer:
            raise _too_costly(kind, filename)
        if "error" in answer:
            raise AppError(**{name: value for name, value in answer["error"].items() if name in _FIELDS})
        columns: dict[str, Any] = answer["columns"]
        return columns

    def close(self) -> None:
        with self._turn:
            self._closed = True
            children = [*self._children]
        for child in children:
            child.end()

    @contextlib.contextmanager
    def _child(self, tenant_id: str) -> Iterator[_Child]:
        """A process for this tenant's turn, which comes when one is free that is not the tenants' last one."""
        with self._turn:
            self._turn.wait_for(
                lambda: self._busy.total() < self._most and self._busy[tenant_id] < max(1, self._most - 1)
            )
            self._busy[tenant_id] += 1
            child = self._idle.pop() if self._idle else None
        try:
            if child is None or child.process.poll() is not None:
                child = self._start(child)
            yield child
        finally:
            with self._turn:
                self._busy[tenant_id] -= 1
                if not self._busy[tenant_id]:
                    del self._busy[tenant_id]
                if child is not None:
                    if child.usable and not self._closed:
                        self._idle.append(child)
                    else:
                        child.end()
                        self._children.discard(child)
                self._turn.notify_all()

    def _start(self, dead: _Child | None) -> _Child:
        child = _Child(self._host)
        with self._turn:
            if dead is not None:
                self._children.discard(dead)
            self._children.add(child)
            closed = self._closed
        if dead is not None:
            dead.end()
        if closed:
            child.end()
        return child


class _Child:
    def __init__(self, host: Host) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "app.inspection.child", json.dumps(host.to_json())],
            cwd=_ROOT,
            env={**child_environment(), "PYTHONPATH": str(_ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a parser says of a hostile file
            start_new_session=True,
        )
        self.usable = True

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer; None where the process ended before it, or was ended because it took too long."""
        assert self.process.stdin is not None
        self.usable = False
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        line = self._line(time.monotonic() + seconds)
        if line is None:
            self.process.kill()
            return None
        self.usable = True
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, deadline: float) -> bytes | None:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while len(line) < _MOST_ANSWER_BYTES and selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(descriptor, 1 << 20)
                if not chunk:
                    return None
                line += chunk
                if line.endswith(b"\n"):
                    return bytes(line)
        return None

    def end(self) -> None:
        """Kill it, wait for it, and close its pipes."""
        self.usable = False
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _unfinished(status: int, kind: str, filename: str) -> AppError:
    """How the client is told that the process ended."""
    log.warning("inspection_ended", kind=kind, filename=filename[:200], status=status)
    if status == -signal.SIGXCPU:
        return _too_costly(kind, filename)
    if status in (-signal.SIGKILL, -signal.SIGTERM, 0):  # by this service, the operator, or a machine out of memory
        detail = f"The {kind} could not be looked into: it took too long, or the service is shutting down."
        return AppError("inspection_interrupted", "Try again", 503, detail, retryable=True)
    return _invalid(kind, f"Looking into the {kind} ended with a crash.")


def _too_costly(kind: str, filename: str) -> AppError:
    log.warning("inspection_limit", kind=kind, filename=filename[:200])
    return _invalid(kind, f"Looking into the {kind} takes more time or memory than is allowed.")


def _invalid(kind: str, detail: str) -> AppError:
    remedy = "Check that the right file was uploaded, and export or pack it again."
    code = "invalid_model" if kind == "model" else "invalid_dataset"
    return AppError(code, f"The {kind} is not valid", 422, detail, remedy=remedy)
