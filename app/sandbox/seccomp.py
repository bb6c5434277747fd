"""Which system calls a process and all that it starts may make: a filter that the kernel runs (seccomp BPF)."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass

from app.sandbox import syscalls

_SET_FILTER, _GET_ACTION = 1, 2
_NEW_LISTENER = 8
_SPEC_ALLOW = 4  # no slower loads for a process that is filtered: it is measured
_ALLOW, _ASK, _ERRNO, _KILL = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
_X32 = 0x40000000  # numbers of another interface of the same machine

_NAMESPACES = 0x7E020000  # CLONE_NEW*
_CLONE_THREAD = 0x10000
_FILE_KINDS, _REGULAR = 0o170000, 0o100000
_PUSHES_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: keys into somebody's terminal
_SOCKET_KIND = 0xF

# Of other processes, of the machine, and what the kernel is most often broken into by.
_FORBIDDEN = (
    "ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "kcmp", "pidfd_getfd",
    "kexec_load", "kexec_file_load", "init_module", "finit_module", "delete_module", "bpf", "perf_event_open",
    "userfaultfd", "add_key", "request_key", "keyctl", "modify_ldt", "iopl", "ioperm", "syslog", "vhangup",
    "mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "open_by_handle_at", "name_to_handle_at", "fanotify_init", "quotactl", "quotactl_fd", "acct",
    "swapon", "swapoff", "reboot", "sethostname", "setdomainname", "settimeofday", "clock_settime", "clock_adjtime",
    "unshare", "setns",
)  # fmt: skip
# A library that finds them missing does without.
_MISSING = (
    "io_uring_setup", "io_uring_enter", "io_uring_register", "clone3",  # whose arguments no filter sees
    "shmget", "shmat", "shmctl", "semget", "semop", "semctl", "semtimedop", "msgget", "msgsnd", "msgrcv", "msgctl",
    "mq_open", "mq_unlink",  # seen by every process of the machine
)  # fmt: skip
# By path, and Landlock does not look at them: answered as done, and not done. What a process makes has the mode that it
# gave it; nobody else's files change.
_AS_IF_DONE = ("chmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchownat", "utime", "utimes", "futimesat")
_NOT_SUPPORTED = (
    "setxattr", "lsetxattr", "removexattr", "lremovexattr", "setxattrat", "removexattrat", "file_setattr",
)  # fmt: skip


@dataclass(frozen=True)
class Filter:
    """`families`: of sockets that may be made, beside pairs; `datagrams`: not TCP alone; `packets`: also local ones of
    the kind that no service of note listens on, and CUDA cannot do without. `processes`: whether any beside this one
    may be started; `counted`: somebody else says so each time. `truncates`: whether files may be cut by path, where
    Landlock sees to it."""

    families: tuple[int, ...] = ()
    datagrams: bool = False
    packets: bool = False
    processes: bool = True
    counted: bool = False
    truncates: bool = False

    def enforce(self) -> int | None:
        """From now on; needs `syscalls.no_new_privileges`. The descriptor that is asked for each process, where they
        are counted (`processes.Counter`). Raises OSError."""
        code = b"".join(self.program())
        buffer = ctypes.create_string_buffer(code, len(code))
        program = _Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
        flags = _NEW_LISTENER if self.counted else 0
        try:
            answer = syscalls.call("seccomp", _SET_FILTER, flags | _SPEC_ALLOW, ctypes.byref(program))
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel that does not know the flag
                raise
            answer = syscalls.call("seccomp", _SET_FILTER, flags, ctypes.byref(program))
        return answer if self.counted else None

    def program(self) -> list[bytes]:
        """Instructions of classic BPF."""
        code = [
            _instruction(_LOAD, _ARCH), _instruction(_EQUAL, syscalls.AUDIT_ARCH, 1, 0), _instruction(_RETURN, _KILL),
            _instruction(_LOAD, _NUMBER), _instruction(_AT_LEAST, _X32, 0, 1), _error(errno.ENOSYS),
        ]  # fmt: skip
        for names, number in (
            (_FORBIDDEN, errno.EPERM),
            (_MISSING, errno.ENOSYS),
            (_AS_IF_DONE, 0),
            (_NOT_SUPPORTED, errno.ENOTSUP),
        ):
            for name in names:
                code += _on(name, [_error(number)])
        code += _on("clone", _if_any_bit(0, _NAMESPACES, _error(errno.EPERM)) + self._clones())
        for name, argument in (("mknod", 1), ("mknodat", 2)):
            code += _on(name, _only_regular(argument))
        code += _on("ioctl", [i for value in _PUSHES_INPUT for i in _if_equal(1, value, _error(errno.EPERM))])
        # With a path it is another's file; without, one that is open.
        code += _on(
            "utimensat", _if_any_bit(1, 0xFFFFFFFF, _error(0)) + _if_any_bit(1, 0xFFFFFFFF, _error(0), high=True)
        )
        code += _on("socket", self._sockets())
        code += _on("socketpair", [*_unless_equal(0, (socket.AF_UNIX,), _error(errno.EACCES))])
        if not self.truncates:
            code += _on("truncate", [_error(errno.EACCES)])
            code += _on("openat2", [_error(errno.ENOSYS)])  # whose flags no filter sees
            for name, argument in (("open", 1), ("openat", 2)):
                code += _on(name, _if_cut_when_read(argument))
        if not self.processes:
            for name in ("fork", "vfork", "execve", "execveat"):
                code += _on(name, [_error(errno.EPERM)])
        elif self.counted:
            for name in ("fork", "vfork"):
                code += _on(name, [_instruction(_RETURN, _ASK)])
        return [*code, _instruction(_RETURN, _ALLOW)]

    def _clones(self) -> list[bytes]:
        if self.processes and not self.counted:
            return []
        answer = _instruction(_RETURN, _ASK) if self.processes else _error(errno.EPERM)
        return [*_argument(0), _instruction(_ANY_BIT, _CLONE_THREAD, 1, 0), answer]

    def _sockets(self) -> list[bytes]:
        refuse = _error(errno.EACCES)
        local = []
        if self.packets:
            packets = [
                *_unless_equal(1, (socket.SOCK_SEQPACKET,), refuse, mask=_SOCKET_KIND),
                _instruction(_RETURN, _ALLOW),
            ]
            local = [*_argument(0), _instruction(_EQUAL, socket.AF_UNIX, 0, len(packets)), *packets]
        if not self.families:
            return [*local, refuse]
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM) if self.datagrams else (socket.SOCK_STREAM,)
        return [*local, *_unless_equal(0, self.families, refuse), *_unless_equal(1, kinds, refuse, mask=_SOCKET_KIND)]


def available(*, asking: bool = False) -> bool:
    """Whether this kernel takes a filter that answers with an error, `asking`: that asks another process, and this
    machine's numbers are known."""
    action = ctypes.c_uint32(_ASK if asking else _ERRNO)
    with suppress(OSError, KeyError):
        syscalls.call("seccomp", _GET_ACTION, 0, ctypes.byref(action))
        return True
    return False


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value & 0xFFFFFFFF)


def _error(number: int) -> bytes:
    return _instruction(_RETURN, _ERRNO | number)


def _on(name: str, body: list[bytes]) -> list[bytes]:
    """`body` where the call is this one; what it lets through is allowed. The number is loaded before and after."""
    if name not in syscalls.NUMBERS:
        return []
    if len(body) == 1:
        return [_instruction(_EQUAL, syscalls.NUMBERS[name], 0, 1), *body]
    body = [*body, _instruction(_RETURN, _ALLOW)]
    return [_instruction(_EQUAL, syscalls.NUMBERS[name], 0, len(body)), *body]


def _argument(index: int, *, high: bool = False) -> list[bytes]:
    return [_instruction(_LOAD, _ARGUMENTS + 8 * index + (4 if high else 0))]  # little-endian, as both machines are


def _if_any_bit(index: int, bits: int, then: bytes, *, high: bool = False) -> list[bytes]:
    return [*_argument(index, high=high), _instruction(_ANY_BIT, bits, 0, 1), then]


def _if_equal(index: int, value: int, then: bytes) -> list[bytes]:
    return [*_argument(index), _instruction(_EQUAL, value, 0, 1), then]


def _unless_equal(index: int, values: tuple[int, ...], then: bytes, mask: int | None = None) -> list[bytes]:
    masked = [] if mask is None else [_instruction(_AND, mask)]
    tests = [_instruction(_EQUAL, v, len(values) - i, 0) for i, v in enumerate(values)]
    return [*_argument(index), *masked, *tests, then]


def _if_cut_when_read(index: int) -> list[bytes]:
    """Files that are opened for reading, and emptied by that."""
    read = [*_argument(index), _instruction(_AND, os.O_ACCMODE), _instruction(_EQUAL, os.O_RDONLY, 0, 1)]
    then = [*read, _error(errno.EACCES)]
    return [*_argument(index), _instruction(_ANY_BIT, os.O_TRUNC, 0, len(then)), *then]


def _only_regular(index: int) -> list[bytes]:
    return _unless_equal(index, (0, _REGULAR), _error(errno.EPERM), mask=_FILE_KINDS)
