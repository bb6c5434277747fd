"""The whole transition matrix: every state with every trigger."""

from __future__ import annotations

from itertools import product

import pytest

from app.domain.job_state import TERMINAL, InvalidTransition, JobStatus, Trigger, transition

S, T = JobStatus, Trigger
ALLOWED = {
    (S.QUEUED, T.CLAIM): S.RUNNING,
    (S.QUEUED, T.CANCEL): S.CANCELLED,
    (S.QUEUED, T.FAIL): S.FAILED,
    (S.RUNNING, T.RELEASE): S.QUEUED,
    (S.RUNNING, T.LEASE_EXPIRED): S.QUEUED,
    (S.RUNNING, T.COMPLETE): S.SUCCEEDED,
    (S.RUNNING, T.FAIL): S.FAILED,
    (S.RUNNING, T.CANCEL): S.CANCELLED,
}


@pytest.mark.parametrize(("state", "trigger"), [*product(JobStatus, Trigger)])
def test_transition_matrix(state: JobStatus, trigger: Trigger) -> None:
    if (state, trigger) in ALLOWED:
        assert transition(state, trigger) is ALLOWED[state, trigger]
    else:
        with pytest.raises(InvalidTransition):
            transition(state, trigger)


def test_terminal_states_are_those_without_a_way_out() -> None:
    with_exit = {state for state, _ in ALLOWED}
    assert set(JobStatus) - with_exit == TERMINAL
