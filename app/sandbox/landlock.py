"""Landlock: which files, ports and processes a process and all that it starts can reach, by the kernel's own decision
(Linux 5.13 and newer; documented in the kernel's `userspace-api/landlock`)."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from contextlib import suppress

from app.sandbox import syscalls

_VERSION = 1  # flag: tell the ABI, make nothing
_PATH_BENEATH, _NET_PORT = 1, 2

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = (1 << n for n in range(6))
MAKE_CHAR, MAKE_DIR, MAKE_REG, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK, MAKE_SYM = (1 << n for n in range(6, 13))
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
BIND_TCP, CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_SOCKETS, SCOPE_SIGNALS = 1, 2

READ = EXECUTE | READ_FILE | READ_DIR
INPUT = READ_FILE | READ_DIR  # a user's files: no program among them is started
SHARED = READ_FILE | READ_DIR | WRITE_FILE | TRUNCATE | MAKE_REG | MAKE_DIR | REMOVE_FILE | REMOVE_DIR | REFER
OWN = SHARED | MAKE_SYM
UNSEEN = SHARED & ~READ_DIR  # files of one's own in a folder that is not listed
DEVICE = READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV | READ_DIR
LIST = READ_DIR
NAME = WRITE_FILE | TRUNCATE  # of a thread
FOLDERS = MAKE_DIR | REMOVE_DIR  # empty ones


class _Ruleset(ctypes.Structure):
    _fields_ = (("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _Port(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64))


def abi() -> int:
    """What the kernel offers; 0 = nothing, or it was left out of its boot parameters."""
    with suppress(OSError, KeyError):
        return syscalls.call("landlock_create_ruleset", None, 0, _VERSION)
    return 0


class Ruleset:
    """Nothing is allowed but what is added. `version`: the ABI to use, at most `abi()`. `files`, `network`: whether it
    is about those, beside signals."""

    def __init__(self, version: int, *, files: bool = True, network: bool = True) -> None:
        self._fs = 0
        if files:
            self._fs = (1 << 13) - 1  # REFER: without it, files move within their own folder only
            for since, right in ((2, REFER), (3, TRUNCATE), (5, IOCTL_DEV)):
                self._fs |= right if version >= since else 0
        net = BIND_TCP | CONNECT_TCP if network and version >= 4 else 0
        scoped = SCOPE_SIGNALS | (_SCOPE_ABSTRACT_SOCKETS if files else 0) if version >= 6 else 0
        attributes = _Ruleset(self._fs, net, scoped)
        size = 24 if version >= 6 else 16 if version >= 4 else 8
        self._fd = syscalls.call("landlock_create_ruleset", ctypes.byref(attributes), size, 0)

    def allow(self, paths: Iterable[str | os.PathLike[str]], rights: int, *, follow: bool = True) -> None:
        """These files, and what lies below these folders; those that are not there are passed over. `follow`: also
        where the path is a symbolic link. Raises OSError."""
        flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        for path in paths:
            try:
                parent = os.open(path, flags)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                continue
            try:
                mode = os.fstat(parent).st_mode
                if stat.S_ISLNK(mode):
                    continue
                allowed = rights & self._fs & (~0 if stat.S_ISDIR(mode) else _OF_FILES)
                beneath = _Beneath(allowed, parent)
                syscalls.call("landlock_add_rule", self._fd, _PATH_BENEATH, ctypes.byref(beneath), 0)
            finally:
                os.close(parent)

    def allow_ports(self, ports: Iterable[int], rights: int) -> None:
        """TCP ports, at any address. Raises OSError."""
        for port in ports:
            rule = _Port(rights, port)
            syscalls.call("landlock_add_rule", self._fd, _NET_PORT, ctypes.byref(rule), 0)

    def enforce(self) -> None:
        """From now on, for this thread and what it starts; needs `syscalls.no_new_privileges`. Raises OSError."""
        syscalls.call("landlock_restrict_self", self._fd, 0)
        os.close(self._fd)


def scope_signals(version: int) -> bool:
    """This process and what it starts from now on signal nobody else; False where the kernel cannot have it so."""
    if version < 6:
        return False
    Ruleset(version, files=False, network=False).enforce()
    return True
