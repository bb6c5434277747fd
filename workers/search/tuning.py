"""Other runtime options for the best engines, and the other batch sizes for them and what ties with them. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from workers.candidates import Candidate
from workers.search import checking, halving, limits, timing
from workers.search.draft import Draft
from workers.search.objective import TIE
from workers.search.requests import Answer, Judge, Make, TryShapes
from workers.search.state import Phase


def begin(d: Draft) -> None:
    """Options do not change the engine, so its accuracy is known, unless they change the arithmetic."""
    alive = d.by_speed(i for i in d.state.accurate if d[i].refused is None)
    leaders = _leaders(d, alive)
    tuned: list[str] = []
    for leader in leaders:
        tuned += add_variants(d, leader, d.variants(d[leader].plan))
    others = [i for i in alive if i in leaders or _ties(d, i, leaders)]
    late = d.deadlines.search_until - _seconds(d, len(others) + len(tuned))
    d.state.tuned = tuple(i for i in tuned if not d.too_late(i, late, "tuning"))
    d.state.queue, d.state.others = d.state.tuned, tuple(others)
    d.state.phase = Phase.VARYING


def add_variants(d: Draft, leader: str, variants: Iterable[Candidate]) -> list[str]:
    """Other runtime options of this engine, as candidates of their own; those that are worth a try."""
    tuned = []
    for variant in variants:
        known = {} if variant.other_values else _accuracy_of(d, leader)
        d.add(variant, of=leader, base=d[leader].base, **known)
        if variant.unlikely:
            d.drop(variant.id, "tuning", f"not tried: {variant.unlikely}")
        else:
            tuned.append(variant.id)
    return tuned


def _leaders(d: Draft, alive: list[str]) -> list[str]:
    """A further engine is tuned where its options may make it the fastest, or where the fastest may turn out to lose
    too much; more than one where options are known to gain much."""
    if not alive:
        return []
    low, sure = d.speed(alive[0]).low, d.beyond_doubt(alive[0])
    further = [i for n, i in enumerate(alive) if n >= 1 and (n < limits.MOST_TUNED or d.large_gain(i) > 1)]
    return alive[:1] + [i for i in further if not sure or halving.can_win(d.speed(i), low, gain=d.tuning_gain(i))]


def _ties(d: Draft, cid: str, leaders: list[str]) -> bool:
    """Whether the other batch sizes decide between it and the fastest."""
    low, ratio = max(d.speed(i).low for i in leaders), d.speed(leaders[0]).ratio
    return halving.can_win(d.speed(cid), low) and d.speed(cid).ratio >= TIE * ratio


def _accuracy_of(d: Draft, leader: str) -> dict[str, object]:
    found = d[leader]
    names = ("accuracy", "asked", "most_asked", "all_seconds", "settled", "kept", "shapes", "shapes_asked")
    return {name: getattr(found, name) for name in names}


def _seconds(d: Draft, engines: int) -> float:
    """What timing so many of them takes, and the original beside them."""
    return d.state.seconds_each * (engines + 1) * len(d.facts.batch_sizes)


def ask(d: Draft) -> Make | None:
    """Builds the variants, which costs no build; then times them. None where that is begun, or not worth it."""
    request = to_make(d)
    if request is not None:
        return request
    tuned = [i for i in d.state.tuned if d[i].refused is None]
    timed = {b for i in d.state.others for b in (d[i].figures or {}).get("batches", ())}
    untimed = {str(b) for b in d.facts.batch_sizes} - timed
    seconds = _seconds(d, len(d.state.others) + len(d.state.tuned))
    d.state.tuned = d.state.queue = tuple(tuned)
    d.state.phase = Phase.TUNED
    if tuned or (untimed and d.state.others and d.search_left > seconds):
        window = timing.short_enough(d, limits.TUNE_SECONDS)
        timing.begin(d, [*d.state.others, *tuned], window, "timing of runtime options", Phase.TUNED)
    return None


def to_make(d: Draft) -> Make | None:
    """The next one of the queue for which there is time."""
    while d.state.queue:
        if not d.too_late(d.state.queue[0], d.deadlines.search_until, "tuning"):
            return Make(d.subject(d.state.queue[0]), d.deadlines.search_until)
        d.state.queue = d.state.queue[1:]
    return None


def take(d: Draft, request: Make, answer: Answer) -> None:
    d.state.queue = tuple(i for i in d.state.queue if i != request.subject.id)
    d.built(request.subject.id, answer)


def ask_tuned(d: Draft) -> Judge | TryShapes | None:
    """Those with other options that are accurate join the others."""
    while d.state.queue:
        cid = d.state.queue[0]
        if d[cid].refused is None and d[cid].plan.other_values and d[cid].kept is None:
            request = _judge(d, cid)
            if request is not None:
                return request
        d.state.queue = d.state.queue[1:]
        if checking.keeps(d, cid):
            d.state.accurate = (*d.state.accurate, cid)
    return None


def _judge(d: Draft, cid: str) -> Judge | TryShapes | None:
    """Known from the engine as built, unless the options change the arithmetic."""
    found = d[cid]
    leader = d[found.of].speed if found.of is not None else None
    if found.accuracy is None:
        if leader is not None and d.speed(cid).ratio <= leader.ratio:
            d.drop(cid, "check", "not faster than the engine as built, and its accuracy would have to be judged anew")
            return None
        if d.too_late(cid, d.deadlines.search_until, "check"):
            return None
    return checking.ask(d, cid)
