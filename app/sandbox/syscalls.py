"""The kernel's interfaces that Python has no function for: system call numbers by machine, and the calls themselves."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from contextlib import suppress

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.syscall.restype = ctypes.c_long

_PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITIES = 64  # more than any kernel has
_CAP_VERSION_3 = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2

# Of each machine that is known: audit architecture, and numbers by name. A call that it does not have is missing.
_X86_64 = {
    "acct": 163, "add_key": 248, "bpf": 321, "capset": 126, "chmod": 90, "chown": 92,
    "chroot": 161, "clock_adjtime": 305, "clock_settime": 227, "clone": 56, "clone3": 435, "delete_module": 176,
    "execve": 59, "execveat": 322, "fanotify_init": 300, "fchmodat": 268, "fchmodat2": 452,
    "fchownat": 260, "file_setattr": 469, "finit_module": 313, "fork": 57, "fsconfig": 431, "fsmount": 432,
    "fsopen": 430, "fspick": 433, "futimesat": 261, "init_module": 175, "io_uring_enter": 426, "io_uring_register": 427,
    "io_uring_setup": 425, "ioctl": 16, "ioperm": 173, "iopl": 172, "kcmp": 312, "kexec_file_load": 320,
    "kexec_load": 246, "keyctl": 250, "landlock_add_rule": 445, "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446, "lchown": 94, "lremovexattr": 198, "lsetxattr": 189, "mknod": 133, "mknodat": 259,
    "modify_ldt": 154, "mount": 165, "mount_setattr": 442, "move_mount": 429, "mq_open": 240, "open": 2,
    "openat": 257, "openat2": 437, "mq_unlink": 241,
    "msgctl": 71, "msgget": 68, "msgrcv": 70, "msgsnd": 69, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "open_tree": 428, "perf_event_open": 298, "pidfd_getfd": 438, "pivot_root": 155, "process_madvise": 440,
    "process_vm_readv": 310, "process_vm_writev": 311, "ptrace": 101, "quotactl": 179, "quotactl_fd": 443,
    "reboot": 169, "removexattr": 197, "removexattrat": 466, "request_key": 249, "seccomp": 317, "semctl": 66,
    "semget": 64, "semop": 65, "semtimedop": 220, "setdomainname": 171, "sethostname": 170, "setns": 308,
    "settimeofday": 164, "setxattr": 188, "setxattrat": 463, "shmat": 30, "shmctl": 31, "shmget": 29, "socket": 41,
    "socketpair": 53, "swapoff": 168, "swapon": 167, "syslog": 103, "truncate": 76, "umount2": 166, "unshare": 272,
    "userfaultfd": 323, "utime": 132, "utimensat": 280, "utimes": 235, "vfork": 58, "vhangup": 153,
}  # fmt: skip
_AARCH64 = {
    "acct": 89, "add_key": 217, "bpf": 280, "capset": 91, "chroot": 51,
    "clock_adjtime": 266, "clock_settime": 112, "clone": 220, "clone3": 435, "delete_module": 106,
    "execve": 221, "execveat": 281, "fanotify_init": 262, "fchmodat": 53, "fchmodat2": 452, "fchownat": 54,
    "file_setattr": 469, "finit_module": 273, "fsconfig": 431, "fsmount": 432, "fsopen": 430, "fspick": 433,
    "init_module": 105, "io_uring_enter": 426, "io_uring_register": 427, "io_uring_setup": 425, "ioctl": 29,
    "kcmp": 272, "kexec_file_load": 294, "kexec_load": 104, "keyctl": 219, "landlock_add_rule": 445,
    "landlock_create_ruleset": 444, "landlock_restrict_self": 446, "lremovexattr": 15, "lsetxattr": 6, "mknodat": 33,
    "mount": 40, "mount_setattr": 442, "move_mount": 429, "mq_open": 180, "openat": 56, "openat2": 437,
    "mq_unlink": 181, "msgctl": 187,
    "msgget": 186, "msgrcv": 188, "msgsnd": 189, "name_to_handle_at": 264, "open_by_handle_at": 265, "open_tree": 428,
    "perf_event_open": 241, "pidfd_getfd": 438, "pivot_root": 41, "process_madvise": 440, "process_vm_readv": 270,
    "process_vm_writev": 271, "ptrace": 117, "quotactl": 60, "quotactl_fd": 443, "reboot": 142, "removexattr": 14,
    "removexattrat": 466, "request_key": 218, "seccomp": 277, "semctl": 191, "semget": 190, "semop": 193,
    "semtimedop": 192, "setdomainname": 162, "sethostname": 161, "setns": 268, "settimeofday": 170, "setxattr": 5,
    "setxattrat": 463, "shmat": 196, "shmctl": 195, "shmget": 194, "socket": 198, "socketpair": 199, "swapoff": 225,
    "swapon": 224, "syslog": 116, "truncate": 45, "umount2": 39, "unshare": 97, "userfaultfd": 282, "utimensat": 88,
    "vhangup": 58,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

AUDIT_ARCH, NUMBERS = _MACHINES.get(platform.machine(), (0, {}))


def call(name: str, *arguments: object) -> int:
    """The system call's answer. Raises OSError."""
    found: int = _LIBC.syscall(ctypes.c_long(NUMBERS[name]), *(_argument(a) for a in arguments))
    return _checked(found)


def prctl(option: int, *arguments: int) -> int:
    """Raises OSError."""
    given = [*arguments, 0, 0, 0, 0][:4]
    return _checked(_LIBC.prctl(option, *(ctypes.c_ulong(a) for a in given)))


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """Raises OSError."""
    texts = (source.encode(), target.encode(), kind.encode())
    _checked(_LIBC.mount(*texts, ctypes.c_ulong(flags), data.encode()))


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; exit at once where it already has."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def no_new_privileges() -> None:
    """From now on no program that this process starts gets more rights than it has itself."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def hide_from_tracing() -> None:
    """Other processes of this user can no longer read this one's memory and environment, nor trace it, nor does it dump
    its core. A program that it starts is as any other."""
    prctl(PR_SET_DUMPABLE, 0)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


def drop_capabilities(keep: tuple[int, ...] = ()) -> None:
    """What root may do beside other users, all but `keep`, is gone for this process and all that it starts."""
    for number in range(_CAPABILITIES):
        with suppress(OSError):  # unknown, or not root: then there is none to drop
            prctl(_PR_CAPBSET_DROP, number)
    with suppress(OSError):  # a kernel that has none
        prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    kept = sum(1 << number for number in keep)
    words = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)  # effective, permitted, inheritable: low words, high words
    try:
        call("capset", ctypes.byref(_CapabilityHeader(_CAP_VERSION_3, 0)), words)
    except OSError:  # not all of `keep` is there to be kept
        call("capset", ctypes.byref(_CapabilityHeader(_CAP_VERSION_3, 0)), (ctypes.c_uint32 * 6)())


def _argument(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(answer: int) -> int:
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return answer
