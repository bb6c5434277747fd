"""Which candidates to try. Pure: the case and the backends' proposals go in; an ordered plan comes out as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workers.candidates import Candidate, Case, Skipped
from workers.kernel import Backend

RANDOM = (
    "the original is random: it answers differently when it is asked the same twice (dropout in training mode, or "
    "numbers that it draws), so that no engine can be compared with it"
)


@dataclass(frozen=True)
class Plan:
    """`candidates`: the most promising first, by prior."""

    candidates: tuple[Candidate, ...]
    skipped: tuple[Skipped, ...]


def plan(case: Case, backends: Mapping[str, Backend]) -> Plan:
    """What all `backends` (this worker's, by name) propose that the job allows."""
    allowed = [
        b
        for name, b in sorted(backends.items())
        if case.spec.target.backends is None or name in case.spec.target.backends
    ]
    if not allowed:
        return Plan((), (Skipped("all", "this worker has no backend that the job allows"),))
    if case.random:
        return Plan((), (Skipped("all", RANDOM),))
    candidates: list[Candidate] = []
    skipped: list[Skipped] = []
    for backend in allowed:
        proposal = backend.propose(case)
        candidates += proposal.candidates
        skipped += proposal.skipped
    tried = {c.precision for c in candidates} | {"fp32"}
    named = " ".join(s.name for s in skipped)
    skipped += [
        Skipped(precision, f"no recipe for {precision} gains on this hardware with the backends of this worker")
        for precision in case.spec.precisions or ()
        if precision not in tried and precision not in named
    ]
    return Plan(tuple(sorted(candidates, key=lambda c: c.prior)), tuple(skipped))
