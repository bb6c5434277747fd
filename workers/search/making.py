"""Building the candidates. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from workers.candidates import Candidate
from workers.search.draft import Draft
from workers.search.reach import over_size
from workers.search.requests import Ahead, Answer, Make
from workers.search.state import Making, Phase


def begin(d: Draft, ids: Sequence[str], then: Phase) -> None:
    """What calibrates comes last: on a large model it takes most of the time, at least as long as all the rest. It is
    not begun where that would leave none to measure what there is. Nor, where half of the time is gone, a second engine
    that computes as the original does: it seldom gains much."""
    queue = tuple(sorted(ids, key=lambda i: calibrates(d[i].plan)))
    half = d.left(d.deadlines.make_until) / 2
    d.state.making = Making(queue, then, begun=d.now, half=half, told=len(ids))
    d.state.phase = Phase.MAKING


def ask(d: Draft) -> Make | None:
    making = d.state.making
    assert making is not None
    until = d.deadlines.make_until
    while making.queue:
        cid = making.queue[0]
        plan, left = d[cid].plan, d.left(until)
        last = calibrates(plan)
        short = left < making.rest if last else left < making.half and making.safe and plan.lossless
        if not d.too_late(cid, 0.0 if short else until, "make"):
            return _make(d, cid)
        making = d.state.making = replace(making, queue=making.queue[1:])
    d.phase_ends("building", making.told)
    d.state.making, d.state.phase = None, making.then
    return None


def ahead(d: Draft) -> list[Ahead]:
    """All that are still to be built; not those that load the engine of another one."""
    queue = d.state.making.queue if d.state.making else ()
    return [Ahead(_make(d, cid), sure=True) for cid in queue if d[cid].of is None]


def _make(d: Draft, cid: str) -> Make:
    """What calibrates comes last, and leaves the rest of the search its time."""
    at = d.deadlines
    return Make(d.subject(cid), at.make_until if calibrates(d[cid].plan) else at.search_until)


def take(d: Draft, request: Make, answer: Answer) -> None:
    making, cid = d.state.making, request.subject.id
    assert making is not None
    built = d.built(cid, answer)
    fits = built and _is_new(d, cid) and _is_small_enough(d, cid)
    counts = not calibrates(d[cid].plan) and (fits or not built)  # what is no use leaves the others their time
    d.state.making = replace(
        making,
        queue=tuple(i for i in making.queue if i != cid),
        rest=d.now - making.begun if counts else making.rest,
        safe=making.safe or (fits and d[cid].plan.lossless),
    )


def _is_new(d: Draft, cid: str) -> bool:
    """Whether no other engine is the same, byte for byte, and loaded in the same way: then a step changed nothing."""
    mine = _identity(d, cid)
    twin = next((i for i in d.alive() if i != cid and _identity(d, i) == mine), None)
    if twin is not None:
        d.drop(cid, "make", f"the engine of {d[twin].plan.name}, byte for byte")
    return twin is None


def _is_small_enough(d: Draft, cid: str) -> bool:
    built = d[cid].built
    assert built is not None
    d.note(cid, "make", "built")
    too_large = over_size(d.spec.constraints, built.size_bytes)
    if too_large is not None:
        d.miss(cid, "make", too_large)
    return too_large is None


def _identity(d: Draft, cid: str) -> tuple[str, str, str]:
    found = d[cid]
    assert found.built is not None
    return found.plan.backend, found.built.engine, json.dumps(found.built.runtime, sort_keys=True)


def nothing_is_small_enough(d: Draft) -> bool:
    """Known once everybody is built: what quantizes further, or computes otherwise, is no smaller."""
    if over_size(d.spec.constraints, d.facts.original_bytes) is None:
        return False
    d.state.out_of_reach = not d.alive() and any(c.missed is not None for c in d.state.candidates.values())
    return d.state.out_of_reach


def calibrates(plan: Candidate) -> bool:
    """Whether making it takes long for its samples. A conversion to fp16 looks at a few, for what leaves its range: an
    engine that takes seconds would get no time where others were compiled for minutes."""
    return any("calibration" in step.extra and step.options.get("recipe") != "fp16" for step in plan.steps)
