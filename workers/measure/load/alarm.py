"""A timer of the kernel for asyncio. The loop's own rounds up to a millisecond (`epoll_wait`), which would count as
latency of the engine."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable

_CLOCK_MONOTONIC = 1  # that of `time.monotonic`
_NONBLOCK, _CLOEXEC = 0o4000, 0o2000000
_ABSOLUTE = 1


class _Spec(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "at_s", "at_ns"))


class Alarm:
    """Calls `ring` in the running loop when it is time. `os.timerfd_create` is Python 3.13's."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK | _CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._fd, self._expired)

    def set(self, at: float) -> None:
        """Ring at this moment of `time.monotonic`; at once where it has passed."""
        ns = max(int(at * 1e9), 1)
        spec = _Spec(0, 0, ns // 1_000_000_000, ns % 1_000_000_000)
        if self._libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _expired(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)
        self._ring()
