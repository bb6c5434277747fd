"""Which candidates to try. Pure: the case and the backends' proposals go in; an ordered plan comes out as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from workers.candidates import Candidate, Case, Skipped
from workers.kernel import Backend, stages
from workers.kernel import backends as known_backends
from workers.pipeline import training
from workers.pipeline.chain import apart

log = structlog.get_logger(__name__)

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
        try:
            proposal = backend.propose(case)
        except Exception as error:  # of a plug-in, say: the others go on
            log.exception("proposal_failed", backend=backend.name)
            skipped.append(Skipped(backend.name, f"its proposal failed: {type(error).__name__}: {error}"[:300]))
            continue
        reasons = [(c, _misfit(c, case.kinds, backend.accepts)) for c in proposal.candidates]
        kept = [planned(c) for c, reason in reasons if reason is None]
        if case.spec.chain is not None and case.spec.chain.apart:
            linked = [apart(c, case.device) for c in kept]
            kept = [c for c in linked if isinstance(c, Candidate)]
            skipped += [c for c in linked if isinstance(c, Skipped)]
        candidates += kept
        skipped += proposal.skipped
        skipped += [Skipped(c.name, reason) for c, reason in reasons if reason is not None]
    skipped += _lacking(case, backends)
    trained, why_not = _trained(case, candidates)
    skipped += why_not
    tried = {c.precision for c in candidates} | {"fp32"}
    named = " ".join(s.name for s in skipped)
    skipped += [
        Skipped(precision, f"no recipe for {precision} gains on this hardware with the backends of this worker")
        for precision in case.spec.precisions or ()
        if precision not in tried and precision not in named
    ]
    return Plan((*sorted(candidates, key=lambda c: c.prior), *trained), tuple(skipped))


def _lacking(case: Case, offered: Mapping[str, Backend]) -> list[Skipped]:
    """What backends that this worker does not offer have to say, of those that the job allows."""
    found: list[Skipped] = []
    for name, backend in sorted(known_backends().items()):
        if name not in offered and name in (case.spec.target.backends or {name}):
            try:
                found += backend().lacking(case)
            except Exception:  # of a plug-in
                log.exception("lacking_failed", backend=name)
    return found


def _trained(case: Case, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Skipped]]:
    """Those that are trained in any case, behind all others: training takes the longest."""
    if case.spec.quantization.training.mode != "always":
        return [], []
    found = training.plan(case)
    if not found.steps:
        return [], [Skipped(training.NAME, f"not trained: {found.why_not}")]
    able = sorted(filter(training.trainable, candidates), key=lambda c: c.prior)
    return [planned(c.after(found.steps, training.SUFFIX, training.NAME, found.instead)) for c in able], []


def planned(candidate: Candidate) -> Candidate:
    """With what the stages say of its steps: the search goes by that, and knows no stage."""
    steps = [replace(s, rounding=stages()[s.stage].rounding(s.options)) for s in candidate.steps]
    return replace(candidate, steps=tuple(steps))


def _misfit(candidate: Candidate, kinds: Sequence[str], accepts: Sequence[str]) -> str | None:
    """Why its steps and its backend do not fit together, by the kinds that each takes and gives; None where they do.
    A backend from another package may err."""
    known, given = stages(), [*kinds]
    for step in candidate.steps:
        stage = known.get(step.stage)
        if stage is None:
            return f"this worker has no stage {step.stage!r}"
        if not set(given) & set(stage.takes):
            return f"{step.stage} takes {' or '.join(stage.takes)}, and there is {', '.join(given)}"
        gives = stage.kinds(step.options)
        given = [gives["model"]] if "model" in gives else []
    if not set(given) & set(accepts):
        return f"{candidate.backend} builds from {' or '.join(accepts)}, and there is {', '.join(given) or 'nothing'}"
    return None
