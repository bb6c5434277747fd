"""The states of a job and the one table of transitions between them."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Trigger(StrEnum):
    """What can happen to a job."""

    CLAIM = "claim"  # a worker takes it, with a lease and a new fencing token
    RELEASE = "release"  # the worker shuts down and gives it back
    LEASE_EXPIRED = "lease_expired"  # the sweeper finds the worker dead
    COMPLETE = "complete"
    FAIL = "fail"
    CANCEL = "cancel"


_TABLE: dict[tuple[JobStatus, Trigger], JobStatus] = {
    (JobStatus.QUEUED, Trigger.CLAIM): JobStatus.RUNNING,
    (JobStatus.QUEUED, Trigger.CANCEL): JobStatus.CANCELLED,
    (JobStatus.QUEUED, Trigger.FAIL): JobStatus.FAILED,  # e.g. given up after too many lost workers
    (JobStatus.RUNNING, Trigger.RELEASE): JobStatus.QUEUED,
    (JobStatus.RUNNING, Trigger.LEASE_EXPIRED): JobStatus.QUEUED,
    (JobStatus.RUNNING, Trigger.COMPLETE): JobStatus.SUCCEEDED,
    (JobStatus.RUNNING, Trigger.FAIL): JobStatus.FAILED,
    (JobStatus.RUNNING, Trigger.CANCEL): JobStatus.CANCELLED,
}

TERMINAL = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED})


class InvalidTransition(Exception):
    """This trigger is not possible in this state."""


def transition(state: JobStatus, trigger: Trigger) -> JobStatus:
    """The state after `trigger`; raises `InvalidTransition` where the table has none."""
    try:
        return _TABLE[state, trigger]
    except KeyError:
        raise InvalidTransition(f"a {state} job cannot take {trigger!r}") from None
