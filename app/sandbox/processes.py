"""Counts the processes of a confined one as they are to be started: beyond a number there are none. Unlike the kernel's
own limit (RLIMIT_NPROC) it holds for root, too, and counts nobody else's."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable
from contextlib import suppress

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_ASKED = struct.Struct("<QII64s")  # id, pid, flags, the call
_ANSWER = struct.Struct("<QqiI")  # id, value, error, flags
_CONTINUE = 1
_PATIENCE_S = 0.2


def wait_counting(pid: int, listener: int, most: int, count: Callable[[], int]) -> None:
    """Until the child `pid` has ended, which is not reaped. `listener`: of its filter (`seccomp.Filter.enforce`);
    `count`: how many processes there are now. This process's SIGALRM is used."""
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    ended = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(listener, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if ended in ready:
                return
            if ready.get(listener, 0) & select.POLLIN:
                _answer(listener, most, count)
            else:  # nobody is left who could ask
                poll.unregister(listener)
    finally:
        os.close(ended)
        signal.signal(signal.SIGALRM, before)


def _answer(listener: int, most: int, count: Callable[[], int]) -> None:
    asked = bytearray(_ASKED.size)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S)  # who asked may have been killed by now: then nobody does
    try:
        fcntl.ioctl(listener, _RECEIVE, asked)
    except OSError:
        return
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    number = _ASKED.unpack(asked)[0]
    answer = (number, 0, 0, _CONTINUE) if count() < most else (number, 0, -errno.EAGAIN, 0)
    with suppress(OSError):
        fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(*answer)))
