"""A search's state while the policy works on it: a copy, at one moment. Every change of it goes through here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from workers.candidates import Candidate
from workers.pipeline.checks import Check
from workers.search import halving
from workers.search.halving import Speed
from workers.search.limits import TUNING_GAIN
from workers.search.objective import primary_batch
from workers.search.requests import Answer, Subject
from workers.search.state import Built, CandidateState, Deadlines, Facts, SearchState

Variants = Callable[[Candidate], Sequence[Candidate]]
_OUT_OF_TIME = "the budget of {} s left no time for it"


class Draft:
    """`variants`: the other runtime options worth trying with a candidate's engine (pure)."""

    def __init__(self, facts: Facts, state: SearchState, now: float, variants: Variants) -> None:
        self.facts = facts
        self.spec = facts.spec
        self.state = state.copy()
        self.now = now
        self.variants = variants
        self.primary = int(primary_batch(self.spec, [str(b) for b in self.spec.benchmark.batch_sizes]))

    # Candidates

    def __getitem__(self, cid: str) -> CandidateState:
        return self.state.candidates[cid]

    def put(self, cid: str, **changes: Any) -> CandidateState:
        found = self.state.candidates[cid] = replace(self[cid], **changes)
        return found

    def add(self, plan: Candidate, **known: Any) -> None:
        """One more, after those that are there."""
        self.state.candidates[plan.id] = proposed(plan, **known)

    def note(self, cid: str, phase: str, decision: str, reason: str | None = None, **told: Any) -> None:
        entry = {"phase": phase, "decision": decision, "reason": reason, **told}
        history = (*self[cid].history, {k: v for k, v in entry.items() if v is not None})
        self.put(cid, history=history)

    def drop(self, cid: str, phase: str, reason: str) -> None:
        """Out of the race, for this reason. The first one stands."""
        if self[cid].refused is None:
            self.put(cid, refused=reason)
            self.note(cid, phase, "dropped", reason)

    def miss(self, cid: str, phase: str, check: Check) -> None:
        """Out of the race: it cannot meet this limit."""
        self.put(cid, missed=check)
        self.drop(cid, phase, check.reason or check.name)

    def refused_by(self, cid: str, answer: Answer, phase: str) -> bool:
        """Whether the answer says that it failed, by its own fault."""
        if answer.get("failed") is None:
            return False
        self.put(cid, failure=answer.get("failure") or self[cid].failure)
        self.drop(cid, phase, str(answer["failed"]))
        return True

    def built(self, cid: str, answer: Answer) -> bool:
        """Take the answer to a `Make`: whether it has an engine."""
        if self.refused_by(cid, answer, "make"):
            return False
        told = answer["built"]
        self.put(cid, built=Built(**{**told, "seconds": tuple(told["seconds"])}))
        return True

    def subject(self, cid: str) -> Subject:
        found = self[cid]
        return Subject(found.plan, self[found.base].plan if found.base else None)

    def alive(self) -> list[str]:
        return [cid for cid, c in self.state.candidates.items() if c.alive]

    def speed(self, cid: str) -> Speed:
        found = self[cid].speed
        assert found is not None, f"{cid} was not timed"
        return found

    def by_speed(self, ids: Iterable[str]) -> list[str]:
        """Those that were timed, the fastest first."""
        return sorted((i for i in ids if self[i].speed is not None), key=lambda i: -self.speed(i).ratio)

    def best(self) -> tuple[str, Speed] | None:
        """The fastest accurate one so far."""
        ranked = self.by_speed(i for i in self.state.accurate if not halving.over_limit(self.spec, self[i].loss))
        return (ranked[0], self.speed(ranked[0])) if ranked else None

    def tuning_gain(self, cid: str) -> float:
        """What other runtime options may still gain, at most; nothing where none would be tried."""
        if not any(v.unlikely is None for v in self.variants(self[cid].plan)):
            return 1.0
        return max(TUNING_GAIN, self.large_gain(cid))

    def large_gain(self, cid: str) -> float:
        """What its options may gain beyond what options usually do; 1 where nothing is known to."""
        return self[cid].plan.options_gain or 1.0

    def beyond_doubt(self, cid: str) -> bool:
        """Whether no further sample will show that it loses too much."""
        found, limit = self[cid], self.spec.validation.max_accuracy_loss_percent
        if found.plan.lossless:
            return True
        if halving.over_limit(self.spec, found.loss):
            return False
        interval = found.loss.get("loss_ci")
        return self.complete(cid) or bool(interval and interval[1] <= limit)

    def safe(self, cid: str) -> bool:
        """Whether samples that the search has not seen will hardly show otherwise: where some are kept apart, all of
        its own say little of a loss near the limit."""
        found, limit = self[cid], self.spec.validation.max_accuracy_loss_percent
        interval = found.loss.get("loss_ci")
        inside = bool(interval and interval[1] <= limit)
        return self.beyond_doubt(cid) and (found.plan.lossless or inside or not self.state.apart)

    def complete(self, cid: str) -> bool:
        """Whether its last check judged all samples there are."""
        found, most = self[cid], self.spec.validation.max_samples
        if found.accuracy is None:
            return False
        return bool(found.loss.get("complete", True)) and (
            found.asked >= most or found.loss.get("samples", 0) < found.asked
        )

    # Time

    @property
    def deadlines(self) -> Deadlines:
        return self.state.deadlines

    def left(self, until: float) -> float:
        return max(until - self.now, 0.0)

    def over(self, until: float) -> bool:
        return self.now >= until

    @property
    def search_left(self) -> float:
        return self.left(self.deadlines.search_until)

    @property
    def out_of_time(self) -> str:
        return _OUT_OF_TIME.format(self.spec.budget_seconds)

    def too_late(self, cid: str, until: float, phase: str) -> bool:
        if not self.over(until):
            return False
        self.state.exhausted = True
        self.put(cid, late=True)
        self.drop(cid, phase, self.out_of_time)
        return True

    def phase_ends(self, name: str, candidates: int) -> None:
        seconds = round(self.now - self.state.phase_began, 2)
        self.state.phases = (*self.state.phases, {"name": name, "seconds": seconds, "candidates": candidates})
        self.state.phase_began = self.now


def proposed(plan: Candidate, **known: Any) -> CandidateState:
    found = CandidateState(plan, **known)
    if not plan.narrows:
        return found
    told: Mapping[str, Any] = {"phase": "plan", "decision": "not lossless", "reason": plan.narrows}
    return replace(found, history=(*found.history, told))
