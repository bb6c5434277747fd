"""Who is checked, in which order, as long as somebody can still win. Pure."""

from __future__ import annotations

from workers.search import checking, halving, limits
from workers.search.draft import Draft
from workers.search.requantized import is_quantized
from workers.search.requests import Ahead, Judge, TryShapes
from workers.search.state import Phase

_MOST_AHEAD = 4  # checks; the further down, the less likely it is asked for


def begin(d: Draft) -> None:
    """A round of checks, of those that had none."""
    for cid in [i for i, c in d.state.candidates.items() if c.passed is not None]:
        d.put(cid, passed=None)
    d.state.queue = tuple(i for i in _order(d) if d[i].accuracy is None)
    d.state.accurate, d.state.took, d.state.check_asked = (), 0.0, None
    d.state.phase = Phase.CHECKING


def ask(d: Draft) -> Judge | TryShapes | None:
    """In the order of speed, until no faster one is left that could win; None where that is over."""
    while d.state.queue:
        cid = d.state.queue[0]
        if d.state.check_asked is not None or not _passed_over(d, cid):
            if d.state.check_asked is None:
                d.state.check_asked = d.now
            request = checking.ask(d, cid)
            if request is not None:
                return request
            d.state.took, d.state.check_asked = d.now - d.state.check_asked, None
            if checking.keeps(d, cid):
                d.state.accurate = (*d.state.accurate, cid)
        d.state.queue = d.state.queue[1:]
    d.phase_ends("accuracy of those that can win", len(d.state.accurate))
    return None


def ahead(d: Draft) -> list[Ahead]:
    """The next checks of those that could win as things stand; `d` is of no use afterwards."""
    asked = [checking.ask(d, cid) for cid in d.state.queue[:_MOST_AHEAD] if not _passed_over(d, cid)]
    return [Ahead(request, sure=False) for request in asked if isinstance(request, Judge)]


def _passed_over(d: Draft, cid: str) -> bool:
    speed, best = d.speed(cid), d.best()
    if best is not None:
        name = d[best[0]].plan.name
        dear = d.state.took > limits.CHECK_SHARE * d.search_left
        if dear and speed.ratio <= best[1].ratio:
            d.state.exhausted = True
            reason = f"not faster than {name}, and the time left hardly holds its check"
            d.put(cid, passed=("check", reason))
            return True
        if not halving.can_win(speed, best[1].low, gain=_gain(d, cid)) and not _would_be_sure(d, cid):
            d.put(cid, passed=("short timing", halving.dropped_as_slow(speed, name, best[1])))
            return True
    return d.too_late(cid, d.deadlines.search_until, "check")


def _would_be_sure(d: Draft, cid: str) -> bool:
    """Whether to fall back on it: of those that are not quantized the fastest, while nobody faster is safe."""
    if is_quantized(d[cid].plan) or any(d.safe(i) for i in d.state.accurate):
        return False
    return not any(not is_quantized(d[i].plan) for i in d.state.accurate)


def _gain(d: Draft, cid: str) -> float:
    """Other runtime options are tried for the fastest accurate ones only: a further one has to win as it is, unless
    options are known to gain much."""
    faster = sum(d.speed(i).ratio >= d.speed(cid).ratio for i in d.state.accurate)
    return d.tuning_gain(cid) if faster < limits.MOST_TUNED or d.large_gain(cid) > 1 else 1.0


def _order(d: Draft) -> list[str]:
    """The fastest first. Where time is short, the fastest that is not quantized comes before: it seldom loses accuracy,
    and then there is something to ship."""
    ids = d.by_speed(d.alive())
    if d.search_left > limits.SHORT * d.deadlines.seconds:
        return ids
    safe = next((i for i in ids if d[i].plan.precision != "int8"), None)
    return ids if safe is None else [safe, *(i for i in ids if i != safe)]


def anybody_left(d: Draft) -> bool:
    """Whether those that were the fastest at the batch size that counts turned out to be slower at another one, and
    others were passed over for them."""
    passed = any(c.passed is not None for c in d.state.candidates.values())
    return passed and not any(d[i].refused is None for i in d.state.accurate)
