"""Confines this process, for good, to what a policy allows."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from app.sandbox import landlock, namespaces, syscalls
from app.sandbox.features import Features
from app.sandbox.policy import Grounds, Policy
from app.sandbox.seccomp import Filter

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_EPHEMERAL_DEFAULT = (32768, 60999)


def confine(policy: Policy, grounds: Grounds, features: Features) -> int | None:
    """By all that the machine has. This process has one thread, and is killed with its parent no more (`prctl`): the
    caller sees to that anew. Where the policy wants processes counted, the answer is the descriptor by which that is
    done (`processes.wait_counting`), for somebody else: without it none is started. Raises OSError, and the process is
    not to be used then."""
    tmp = ""
    if features.namespaces and policy.processes:
        tmp = _own_tmp(policy, grounds)
        namespaces.enter(
            network=policy.loopback,
            shared_memory_bytes=policy.shared_memory_bytes,
            settings_read_only=policy.names_threads,
            tmp=tmp,
        )
    syscalls.no_new_privileges()
    if features.landlock:
        rules = _ruleset(policy, grounds, features)
        if tmp:  # the folder that is mounted there
            rules.allow((namespaces.TMP,), landlock.OWN, follow=False)
        rules.enforce()
    # Where files are kept apart by Landlock, root may go on reading what belongs to other users.
    kept = (syscalls.CAP_DAC_OVERRIDE, syscalls.CAP_DAC_READ_SEARCH) if features.landlock else ()
    syscalls.drop_capabilities(kept)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)  # a change of rights takes it, and the worker looks at its memory
    if not features.seccomp:
        return None
    return Filter(
        families=(socket.AF_INET, socket.AF_INET6) if policy.loopback else (),
        datagrams=policy.loopback and features.namespaces,
        packets=policy.packets,
        processes=policy.processes,
        counted=policy.counted and features.counting,
        truncates=not features.landlock or features.landlock >= 3,
    ).enforce()


def _own_tmp(policy: Policy, grounds: Grounds) -> str:
    """Its folder, unless something that is reached lies in the machine's /tmp: it would be out of reach then."""
    reached = (*grounds.read, *grounds.listed, *policy.read, *policy.inputs, *policy.own, *policy.shared)
    if any(Path(path).is_relative_to(namespaces.TMP) for path in reached):
        return ""
    return policy.tmp


def close_descriptors(keep: Iterable[int]) -> None:
    """All others that this process was left with."""
    kept = {*keep}
    for path in [*Path("/proc/self/fd").iterdir()]:
        if int(path.name) not in kept:
            with suppress(OSError):  # that of the listing
                os.close(int(path.name))


def _ruleset(policy: Policy, grounds: Grounds, features: Features) -> landlock.Ruleset:
    own_loopback = policy.loopback and features.namespaces  # on which nobody else is
    rules = landlock.Ruleset(features.landlock, network=not own_loopback)
    rules.allow((*grounds.read, *policy.read), landlock.READ)
    rules.allow((*grounds.listed, *policy.listed), landlock.LIST)
    # What a process before this one may have made: a link in its place leads nowhere.
    rules.allow(policy.inputs, landlock.INPUT, follow=False)
    rules.allow(policy.own, landlock.OWN, follow=False)
    rules.allow(policy.shared, landlock.SHARED, follow=False)
    rules.allow(policy.folders, landlock.FOLDERS, follow=False)
    rules.allow(policy.devices, landlock.DEVICE)
    if policy.names_threads:
        # A process that it starts has threads, too, and what they are called lies in a folder that is not there yet.
        rules.allow(("/proc",) if _settings_are_safe(features) else ("/proc/self/task",), landlock.NAME)
    if policy.shared_memory_bytes:
        rules.allow(("/dev/shm",), landlock.OWN if features.namespaces else landlock.UNSEEN)  # noqa: S108
    if policy.loopback and not own_loopback and features.landlock >= 4:
        rules.allow_ports((0,), landlock.BIND_TCP)
        rules.allow_ports(_ephemeral_ports(), landlock.BIND_TCP | landlock.CONNECT_TCP)
    return rules


def _settings_are_safe(features: Features) -> bool:
    """Whether who may write below /proc can change nothing of the machine: it is mounted so, or belongs to another
    user."""
    return features.namespaces or os.geteuid() != 0 or bool(os.statvfs("/proc/sys").f_flag & os.ST_RDONLY)


def _ephemeral_ports() -> range:
    """Those that the system gives to who asks for any: no service of note listens there."""
    try:
        low, high = map(int, _EPHEMERAL.read_text().split())
    except (OSError, ValueError):
        low, high = _EPHEMERAL_DEFAULT
    return range(low, high + 1)
