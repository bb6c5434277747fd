"""What this machine has to confine a process with, and what that leaves open."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.sandbox import landlock, namespaces, seccomp, syscalls

_PROBED_BYTES = 1 << 20


@dataclass(frozen=True)
class Features:
    """`landlock`: its ABI, 0 = none. `namespaces`: of users, mounts and network, without being root. `counting`:
    whether processes are counted as they are started."""

    landlock: int
    seccomp: bool
    namespaces: bool
    counting: bool = False

    @property
    def enough(self) -> bool:
        """For `required`: neither files nor network are open."""
        return self.landlock > 0 and self.seccomp

    def missing(self) -> list[str]:
        """What is open for want of something, in words for the operator."""
        found = []
        if not self.landlock:
            found.append("files: the kernel has no Landlock (Linux 5.13 or newer, with landlock among its lsm=)")
        elif self.landlock < 6:
            found.append(f"signals to this user's processes: Landlock {self.landlock}, 6 is needed (Linux 6.12)")
        if not self.seccomp:
            found.append("system calls and network: no seccomp filters")
        if not self.counting:
            found.append("processes of a fork bomb, for a while: the kernel asks nobody (Linux 5.5)")
        if not self.namespaces:
            found.append("shared memory: no user namespaces, /dev/shm is that of the machine")
            if self.landlock < 4:
                found.append("network of load tests: neither user namespaces nor Landlock 4 (Linux 6.7)")
        return found

    @property
    def load_tests(self) -> str:
        """What stages that serve on loopback can reach: `own` (a loopback of their own), `ports` (TCP to ports that the
        system hands out), `tcp` (all of TCP), `open`."""
        if self.namespaces:
            return "own"
        if self.landlock >= 4:
            return "ports"
        return "tcp" if self.seccomp else "open"

    def to_json(self, mode: str) -> dict[str, Any]:
        """As `GET /v1/capabilities` tells it of a worker."""
        if mode == "off":
            return {"mode": mode, "landlock": 0, "seccomp": False, "namespaces": False, "missing": ["it is turned off"]}
        return {
            "mode": mode,
            "landlock": self.landlock,
            "seccomp": self.seccomp,
            "namespaces": self.namespaces,
            "network": "none" if self.seccomp else "open",
            "network_of_load_tests": self.load_tests,
            "missing": self.missing(),
        }


NOTHING = Features(0, seccomp=False, namespaces=False)


@functools.cache
def found() -> Features:
    """Of this machine, asked once. Namespaces are tried in a process of their own."""
    if not syscalls.NUMBERS:
        return NOTHING
    counting = seccomp.available(asking=True) and hasattr(os, "pidfd_open") and landlock.abi() > 0  # so Linux 5.13
    return Features(landlock.abi(), seccomp.available(), _namespaces_work(), counting)


def _namespaces_work() -> bool:
    """All that `namespaces.enter` does, and Python's own files can be read there still (root is root no more)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            namespaces.enter(network=True, shared_memory_bytes=_PROBED_BYTES, settings_read_only=True)
            with Path(os.__file__).open("rb") as file:
                file.read(1)
            code = 0 if os.access(sys.executable, os.X_OK) else 1
        finally:
            os._exit(code)
    _pid, status = os.waitpid(pid, 0)
    return status == 0
