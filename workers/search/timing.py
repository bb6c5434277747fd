"""Short timings: side by side, in groups where memory does not hold all. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from app.domain.failures import StageFailure
from workers.search import halving
from workers.search.draft import Draft
from workers.search.limits import ENOUGH_CALLS, LEAST_SCREEN_SECONDS, MOST_FINALISTS, NO_MEMORY, NO_ROOM, OF_THE_FULL
from workers.search.objective import BASELINE
from workers.search.reach import out_of_reach
from workers.search.requests import Answer, Time
from workers.search.room import groups_that_fit
from workers.search.state import Phase, Timing

FinalSeconds = Callable[[Mapping[str, Mapping[int, float | None]]], float]


def begin(
    d: Draft, ids: Sequence[str], seconds: float, name: str, then: Phase, batch_sizes: tuple[int, ...] | None = None
) -> None:
    """`batch_sizes`: None stands for all of the job's."""
    sizes = {i: built.size_bytes for i in ids if (built := d[i].built) is not None}
    groups, too_large = groups_that_fit(sizes, d.facts.memory_bytes, d.facts.original_bytes, baselines=1)
    for cid in too_large:
        d.drop(cid, "timing", NO_ROOM)
    seconds = min(seconds, d.spec.benchmark.min_seconds * OF_THE_FULL)
    d.state.timing = Timing(name, seconds, batch_sizes, tuple(map(tuple, groups)), len(ids), then)
    d.state.phase = Phase.TIMING


def ask(d: Draft) -> Time | None:
    timing = d.state.timing
    assert timing is not None
    if timing.groups and d.over(d.deadlines.search_until):
        d.state.exhausted = True
        for cid in (i for group in timing.groups for i in group):
            _not_timed(d, cid, timing.name, d.out_of_time)
        timing = replace(timing, groups=())
    if timing.groups:
        d.state.timing = replace(timing, asked=d.now)
        subjects = tuple(d.subject(i) for i in timing.groups[0])
        return Time(subjects, timing.seconds, timing.batch_sizes, d.deadlines.search_until)
    d.phase_ends(timing.name, timing.told)
    d.state.timing, d.state.phase = None, timing.then
    return None


def take(d: Draft, request: Time, answer: Answer) -> None:
    timing = d.state.timing
    assert timing is not None
    group, rest = timing.groups[0], timing.groups[1:]
    failure = answer.get("failure")
    if failure is not None:
        d.state.exhausted |= failure["code"] == "timed_out"
        if failure["code"] in NO_MEMORY and len(group) > 1:  # what calls take counts, too
            half = len(group) // 2
            d.state.timing = replace(timing, groups=(group[:half], group[half:], *rest))
            return
        for cid in group:
            _not_timed(d, cid, timing.name, f"not measured: {failure['detail']}")
    else:
        sizes = max(len(answer.get("batch_sizes") or ()), 1)
        # The original is timed beside them.
        d.state.seconds_each = (d.now - timing.asked) / (len(request.subjects) + 1) / sizes
        d.state.original = answer["engines"].get(BASELINE)
        for cid in group:
            _timed(d, cid, answer["engines"].get(cid), timing.name, answer.get("at"))
    d.state.timing = replace(timing, groups=rest)


def _timed(d: Draft, cid: str, figures: Mapping[str, Any] | None, name: str, at: str | None) -> None:
    speed = halving.speed_of(d.spec, figures)
    if figures is None or speed is None:
        failure = StageFailure.from_json(figures["failed"]) if figures and "failed" in figures else None
        if failure is not None and failure.code == "budget_exhausted":
            _not_timed(d, cid, name, failure.detail)
            return
        d.put(cid, failure=d[cid].failure or (failure.to_json() if failure else None))
        d.drop(cid, name, failure.detail if failure else "it was not measured at the batch size that counts")
        return
    d.put(cid, figures=figures, figures_at=at, speed=speed)
    d.note(cid, name, "timed", ratio=round(speed.ratio, 4), low=round(speed.low, 4), high=round(speed.high, 4))
    elsewhere = halving.slower_elsewhere(d.spec, figures, d.large_gain(cid))
    if elsewhere and not shall_shrink(d):
        d.put(cid, slow_elsewhere=d[cid].refused is None or d[cid].slow_elsewhere)
        d.drop(cid, name, elsewhere)


def _not_timed(d: Draft, cid: str, name: str, why: str) -> None:
    """For want of time or memory. What was timed before, beside fewer others, keeps that."""
    if d[cid].speed is not None:
        d.note(cid, name, "not timed again", why)
    else:
        d.put(cid, late=True)
        d.drop(cid, name, why)


def shall_shrink(d: Draft) -> bool:
    """Whether an engine may be asked for because it is smaller than the original, though no faster."""
    limits = d.spec.constraints
    return limits.max_size_mb is not None or limits.max_memory_mb is not None


def first_batch_sizes(d: Draft) -> tuple[int, ...] | None:
    """The one that counts; the others are timed later, for those that can still win. A large one may be more than the
    original itself takes: then it is not timed alone."""
    return (d.primary,) if d.primary == min(d.spec.benchmark.batch_sizes) else None


def short_enough(d: Draft, seconds: float) -> float:
    """`seconds`, or less where so many calls of the original take less, at its largest batch size."""
    if not d.state.sample_ms:
        return seconds
    calls = ENOUGH_CALLS * d.state.sample_ms * max(d.facts.batch_sizes) / 1e3
    return min(seconds, max(calls, LEAST_SCREEN_SECONDS))


# What the first timing tells


def nothing_is_fast_enough(d: Draft) -> bool:
    """By the short timing, with all that other runtime options may bring."""
    limits, alive = d.spec.constraints, d.alive()
    if d.state.original is None or out_of_reach(limits, d.state.original, d.primary) is None:
        return False
    misses = {i: out_of_reach(limits, d[i].figures, d.primary, d.tuning_gain(i)) for i in alive}
    if not all(misses.values()):
        return False
    for cid, miss in misses.items():
        assert miss is not None
        d.miss(cid, "short timing", miss)
    d.state.out_of_reach = True
    return True


def call_times(d: Draft) -> dict[str, dict[int, float | None]]:
    """ms of a call by engine and batch size: of the original and of the fastest, which the final measurement takes."""
    fastest = [d[i].figures for i in d.by_speed(d.alive())[:MOST_FINALISTS]]
    figures = {BASELINE: d.state.original, **{str(i): f for i, f in enumerate(fastest)}}
    found: dict[str, dict[int, float | None]] = {}
    for name, known in figures.items():
        at: dict[int, float] = {int(batch): _call_ms(f) for batch, f in (known or {}).get("batches", {}).items()}
        least = min(at, default=1)  # a batch size that the short timing left out takes as long per sample
        found[name] = {**{b: at[least] * b / least for b in d.facts.batch_sizes if at and b not in at}, **at}
    return found


def _call_ms(at: Mapping[str, Any]) -> float:
    """Of slow engines a short timing has too few calls for a median."""
    return float(at.get("p50_ms") or at.get("mean_ms") or 0.0)
