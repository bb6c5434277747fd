"""A process's own view of the machine: network (loopback, with nobody else on it), shared memory, users, and where
asked for the kernel's settings as files that nobody writes to, and a /tmp of its own. The kernel makes it for an
ordinary user too, where that is not turned off (containers, hardened distributions)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from app.sandbox import syscalls

_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, _NEW_NETWORK = 0x00020000, 0x08000000, 0x10000000, 0x40000000
_RECURSIVE, _PRIVATE = 0x4000, 1 << 18
_NO_SETUID, _NO_DEVICES, _NO_PROGRAMS = 2, 4, 8
_BIND, _HERE, _WHOLE, _READ_ONLY = 0x1000, -100, 0x8000, 1  # MS_BIND, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY
_GET_FLAGS, _SET_FLAGS, _UP = 0x8913, 0x8914, 1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a mount of the process's own is what is made here)
TMP = "/tmp"  # noqa: S108 (likewise)


class _Attributes(ctypes.Structure):
    _fields_ = (
        ("set", ctypes.c_uint64),
        ("clear", ctypes.c_uint64),
        ("spread", ctypes.c_uint64),
        ("fd", ctypes.c_uint64),
    )


def enter(*, network: bool, shared_memory_bytes: int, settings_read_only: bool = False, tmp: str = "") -> None:
    """This process, which has one thread, gets its own; root loses its power over the machine. `network`: a loopback of
    its own; else the network stays as it is. `settings_read_only`: of /proc all that is no process's. `tmp`: the folder
    that is /tmp from now on, if any; what lies in the machine's is not there any more. Raises OSError, and the process
    is not to be used then."""
    user, group = os.geteuid(), os.getegid()
    syscalls.call("unshare", _NEW_USERS | _NEW_MOUNTS | _NEW_IPC | (_NEW_NETWORK if network else 0))
    own = Path("/proc/self")
    (own / "setgroups").write_text("deny")
    (own / "uid_map").write_text(f"{user} {user} 1")
    (own / "gid_map").write_text(f"{group} {group} 1")
    syscalls.mount("none", "/", "", _RECURSIVE | _PRIVATE, "")
    if Path(_SHARED_MEMORY).is_dir():
        data = f"size={shared_memory_bytes},mode=1777"
        syscalls.mount("tmpfs", _SHARED_MEMORY, "tmpfs", _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS, data)
    if settings_read_only:
        for entry in [*Path("/proc").iterdir()]:
            if not entry.name.isdecimal() and not entry.is_symlink():
                _protect(str(entry))
    if tmp:
        syscalls.mount(tmp, TMP, "", _BIND, "")
    if network:
        _start_loopback()


def _protect(path: str) -> None:
    """With all that is mounted below."""
    syscalls.mount(path, path, "", _BIND | _RECURSIVE, "")
    attributes = _Attributes(_READ_ONLY, 0, 0, 0)
    where = ctypes.c_char_p(path.encode())
    syscalls.call("mount_setattr", _HERE, where, _WHOLE, ctypes.byref(attributes), ctypes.sizeof(attributes))


def _start_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(any_socket, _GET_FLAGS, request), 16)
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sH22x", b"lo", flags | _UP))
