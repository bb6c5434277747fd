"""Two engines for one bundle: one answers the batches up to a size, the other those beyond. Pure.

Where the batch size changes who wins, one engine is at best a compromise, and often none ships: the fastest at the size
that counts is slower than the original at another. So those that were passed over are timed at the other sizes, too,
and the two that together gain the most become finalists: of what the search holds accurate, and of the original itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product
from typing import Any

from workers.search import checking, limits, timing, tuning
from workers.search.draft import Draft
from workers.search.limits import MOST_FINALISTS, SLOWER
from workers.search.objective import BASELINE, TIE, ratio_of
from workers.search.requests import Judge, Make, TryShapes
from workers.search.state import Pair, Phase

Gains = Mapping[int, float]  # batch size → gain over the original


@dataclass(frozen=True)
class Both:
    """Who answers batches up to `low`, and who from `high` on; nothing is known of sizes between."""

    small: str
    large: str
    low: int
    high: int

    def gains(self, table: Mapping[str, Gains]) -> dict[int, float]:
        sizes = sorted(table[self.small].keys() & table[self.large].keys())
        return {size: table[self.small if size <= self.low else self.large][size] for size in sizes}


# Asking


def begin(d: Draft) -> None:
    """Those that were not timed at every batch size, one of each backend and precision: what a batch size changes is
    how they compute."""
    d.state.pair, d.state.phase = None, Phase.PAIRING
    if not _allowed(d):
        d.state.phase = Phase.CHOOSING
        return
    pool = _to_time(d)
    if pool:
        seconds = timing.short_enough(d, limits.SCREEN_SECONDS)
        timing.begin(d, pool, seconds, "timing at the other batch sizes", Phase.PAIRING)


def ask(d: Draft) -> Judge | TryShapes | None:
    """Checks of those that would be of the two, or nothing more to ask."""
    while True:
        found = best(d)
        both = () if found is None else tuple(i for i in (found.small, found.large) if i != BASELINE)
        unknown = next((i for i in both if d[i].kept is None), None)
        if found is not None and unknown is None:
            d.state.pair = _pair(found, _table(d, (found.small, found.large)))
            _vary(d, d.state.pair)
            return None
        if unknown is None or d.over(d.deadlines.search_until):
            d.state.phase = Phase.CHOOSING
            return None
        if d[unknown].slow_elsewhere:
            d.put(unknown, refused=None)  # the other one answers there
        request = checking.ask(d, unknown)
        if request is not None:
            return request


def ask_varied(d: Draft) -> Make | None:
    """Makes the two with other runtime options, which costs no build; then times them side by side once more, at sizes
    between, too, where the time holds it."""
    request, known = tuning.to_make(d), d.state.pair
    if request is not None:
        return request
    assert known is not None
    varied = [i for i in known.varied if d[i].alive]
    between = sizes_between(*known.border)
    sizes = tuple(sorted({*d.facts.batch_sizes, *between}))
    d.state.pair, d.state.phase = replace(known, varied=tuple(varied)), Phase.CHOOSING
    if (between or varied) and d.search_left > _seconds(d, 2 + len(varied), sizes) + _final_seconds(d):
        window = timing.short_enough(d, limits.TUNE_SECONDS if varied else limits.SCREEN_SECONDS)
        timing.begin(d, [*members(d), *varied], window, "timing between the batch sizes", Phase.BORDER, sizes)
    else:
        _pass_over(d, varied)
    return None


def ask_border(d: Draft) -> None:
    """After they were timed between the sizes: the border is where one overtakes the other, each with the options that
    gain the most at the batches that it answers."""
    known = d.state.pair
    assert known is not None
    d.state.pair, d.state.phase = None, Phase.CHOOSING
    both = [i for i in (known.small, known.large) if i != BASELINE]
    if all(_eligible(d, i) for i in both):
        varied = [i for i in known.varied if _eligible(d, i)]
        table = _table(d, (*both, *varied))
        of_each = [[i, *(v for v in varied if d[v].of == i)] for i in (known.small, known.large)]
        borders = [b for small, large in product(*of_each) for b in _borders(small, large, table)]
        fitting = [b for b in borders if _worth_it(d, b, table)]
        d.state.pair = _pair(max(fitting, key=lambda b: _score(b, table)), table) if fitting else None
    _pass_over(d, [i for i in (*both, *known.varied) if i not in members(d)])


def members(d: Draft) -> tuple[str, ...]:
    """Who has to become a finalist for the two's sake."""
    pair = d.state.pair
    return () if pair is None else tuple(i for i in (pair.small, pair.large) if i != BASELINE)


def _allowed(d: Draft) -> bool:
    """Where the job may have it, and the time holds two more engines in the full measurement."""
    facts = d.facts
    if d.spec.most_engines < 2 or len(facts.batch_sizes) < 2 or not facts.batched:
        return False
    if not any(_eligible(d, i) and (c.kept or c.slow_elsewhere) for i, c in d.state.candidates.items()):
        return False
    return d.search_left > _final_seconds(d) + _seconds(d, limits.MOST_PAIRED, facts.batch_sizes)


def _to_time(d: Draft) -> list[str]:
    wanted, seen = {str(b) for b in d.facts.batch_sizes}, set()
    known = [i for i, c in d.state.candidates.items() if _eligible(d, i) and (c.kept or c.slow_elsewhere)]
    fastest = max(d.speed(i).ratio for i in known)
    for cid, found in d.state.candidates.items():
        if _eligible(d, cid) and found.kept and wanted <= {*(found.figures or {})["batches"]}:
            seen.add((found.plan.backend, found.plan.precision))
    within = limits.PAIR_WITHIN ** max(
        1.0, math.log(max(d.facts.batch_sizes) / min(d.facts.batch_sizes), limits.PAIR_STEP)
    )
    pool: list[str] = []
    for cid in d.by_speed(d.alive()):
        found = d[cid]
        kind = (found.plan.backend, found.plan.precision)
        far = d.speed(cid).ratio < within * fastest
        if kind in seen or far or found.kept is False or wanted <= {*(found.figures or {})["batches"]}:
            continue
        seen.add(kind)
        pool.append(cid)
    return pool[: limits.MOST_PAIRED]


def _seconds(d: Draft, engines: int, sizes: Sequence[int]) -> float:
    """What timing so many of them takes, and the original beside them."""
    return d.state.seconds_each * (engines + 1) * len(sizes)


def _final_seconds(d: Draft) -> float:
    """Of two more engines in the full measurement."""
    return d.deadlines.final_seconds * 2 / (MOST_FINALISTS + 2)


def _vary(d: Draft, known: Pair) -> None:
    """Who the two are is settled. One that is not among the fastest at the size that counts was not tried with other
    runtime options; where the time holds it, it is now, with those that change no values: its accuracy is known."""
    engines = [i for i in members(d) if d[i].of is None and all(c.of != i for c in d.state.candidates.values())]
    variants = {i: [v for v in d.variants(d[i].plan) if not v.other_values] for i in engines}
    likely = sum(v.unlikely is None for found in variants.values() for v in found)
    sizes = {*d.facts.batch_sizes, *sizes_between(*known.border)}
    if likely and d.search_left > _seconds(d, 2 + likely, [*sizes]) + _final_seconds(d):
        varied = [v for i, found in variants.items() for v in tuning.add_variants(d, i, found)]
        known = replace(known, varied=tuple(varied))
    d.state.pair, d.state.queue, d.state.phase = known, known.varied, Phase.PAIR_VARYING


def _pass_over(d: Draft, ids: Iterable[str]) -> None:
    """Of the two engines, those that shall not answer as they are loaded, and that nobody considers alone."""
    for cid in ids:
        if cid not in d.state.accurate:
            d.drop(cid, "pairing", "it was to be one of two engines in a bundle, which gain no more with it")


def sizes_between(low: int, high: int) -> tuple[int, ...]:
    """Powers of two, three of them at most."""
    powers = [2**n for n in range(1, 13) if low < 2**n < high]
    return tuple(powers if len(powers) <= 3 else [powers[round(i * (len(powers) - 1) / 2)] for i in range(3)])


# Choosing


def best(d: Draft) -> Both | None:
    """The two that gain the most over all sizes, of those that are as fast as the fastest at the one that counts."""
    table = _table(d, (i for i in d.state.candidates if _eligible(d, i)))
    found = [b for s, g in permutations(table, 2) for b in _borders(s, g, table) if _worth_it(d, b, table)]
    return max(found, key=lambda b: _score(b, table), default=None)


def _eligible(d: Draft, cid: str) -> bool:
    """Built, and not known to lose too much or to be of no use; slower elsewhere is no fault here."""
    found = d[cid]
    if found.built is None or found.speed is None or found.kept is False:
        return False
    return found.refused is None or found.slow_elsewhere


def _table(d: Draft, ids: Any) -> dict[str, Gains]:
    """Gains of those that were timed at every batch size of the job, and of the original."""
    sizes = {str(b) for b in d.facts.batch_sizes}
    found: dict[str, Gains] = {}
    for cid in ids:
        at = {} if cid == BASELINE else (d[cid].figures or {}).get("batches", {})
        ratios = {int(size): ratio_of(d.spec, figures) for size, figures in at.items()}
        gains = {size: float(r["ratio"]) for size, r in ratios.items() if r is not None}
        if sizes <= {str(size) for size in gains}:
            found[cid] = gains
    every = {size for gains in found.values() for size in gains}
    return {**found, BASELINE: dict.fromkeys(every, 1.0)}


def _borders(small: str, large: str, table: Mapping[str, Gains]) -> Iterator[Both]:
    sizes = sorted(table[small].keys() & table[large].keys())
    for low, high in pairwise(sizes):
        yield Both(small, large, low, high)


def _score(both: Both, table: Mapping[str, Gains]) -> float:
    return sum(math.log(max(gain, 1e-9)) for gain in both.gains(table).values())


def _worth_it(d: Draft, both: Both, table: Mapping[str, Gains]) -> bool:
    """As fast as anybody at the size that counts, slower than the original nowhere, and at some size clearly faster
    than the one engine that would ship else."""
    gains, sizes = both.gains(table), d.facts.batch_sizes
    fastest = max((g[d.primary] for i, g in table.items() if i == BASELINE or d[i].kept), default=1.0)
    if gains[d.primary] < TIE * fastest or gains[d.primary] <= 1.0 or min(gains[s] for s in sizes) < SLOWER:
        return False
    if _size_mb(d, both) > (d.spec.constraints.max_size_mb or math.inf):
        return False
    alone = _alone(d, sizes)
    return alone is None or any(gains[s] > limits.PAIR_GAIN * alone[s] for s in sizes)


def _size_mb(d: Draft, both: Both) -> float:
    built = [d[i].built for i in (both.small, both.large) if i != BASELINE]
    original = d.facts.original_bytes * (2 - len(built))
    return (original + sum(b.size_bytes for b in built if b is not None)) / 1e6


def _alone(d: Draft, sizes: Sequence[int]) -> Gains | None:
    """Of the one engine that would ship, as far as the search can tell."""
    able = [i for i, c in d.state.candidates.items() if c.alive and c.kept and c.speed is not None]
    table = {i: g for i, g in _table(d, able).items() if i != BASELINE and min(g[s] for s in sizes) >= SLOWER}
    if not table:
        return None
    lead = max(g[d.primary] for g in table.values())
    tied = [g for g in table.values() if g[d.primary] >= TIE * lead]
    return max(tied, key=lambda g: sum(math.log(max(g[s], 1e-9)) for s in sizes))


def _pair(both: Both, table: Mapping[str, Gains]) -> Pair:
    """Of sizes between, which nobody timed, each takes its half, counted in factors."""
    most = max(both.low, math.isqrt(both.low * both.high))
    measured = {i: {str(size): gain for size, gain in table[i].items()} for i in (both.small, both.large)}
    return Pair(both.small, both.large, min(most, both.high - 1), (both.low, both.high), measured)
