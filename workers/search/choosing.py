"""The finalists: who is worth the full method. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from workers.search import checking, halving
from workers.search.draft import Draft
from workers.search.limits import MOST_FINALISTS
from workers.search.requantized import is_quantized


def choose(d: Draft, both: Sequence[str] = ()) -> None:
    """`both`: who answers together in one bundle; they are measured in full whatever they are worth alone."""
    timed = _one_for_each_engine(d, both)
    ranked = [(i, d.speed(i), d.safe(i)) for i in timed]
    over_all = {i: halving.over_all_sizes(d.spec, d[i].figures) for i in timed}
    likely = next((i for i in timed if not is_quantized(d[i].plan)), None)
    chosen, reasons = halving.finalists(ranked, over_all=over_all, fallback=likely)
    for cid in timed:
        if cid in reasons and cid not in both:
            d.drop(cid, "finalists", reasons[cid])
    for cid in d.alive():
        if cid not in chosen and cid not in both:
            d.drop(cid, *(d[cid].passed or ("check", checking.why_not(d, cid))))
    for cid in both:
        d.put(cid, refused=None)
        d.note(cid, "finalists", "for a bundle of two", "one of two engines that gain more together than one does")
    chosen += [cid for cid in both if cid not in chosen]
    finish(d, chosen or _unproven(d))


def finish(d: Draft, chosen: list[str]) -> None:
    for cid in chosen:
        d.put(cid, finalist=True)
    d.state.finalists = tuple(chosen)


def _one_for_each_engine(d: Draft, both: Sequence[str]) -> list[str]:
    """The fastest first; each engine with the best of its runtime options, which were timed side by side: of those that
    cannot be told apart at the batch size that counts, the one that is fastest over all."""
    engines: dict[str, list[str]] = {}
    for cid in d.by_speed(i for i in d.state.accurate if d[i].refused is None):
        engines.setdefault(d[cid].of or cid, []).append(cid)
    kept = []
    for ids in engines.values():
        lead = d.speed(ids[0])
        tied = [i for i in ids if halving.can_win(d.speed(i), lead.low)]
        best = max(tied, key=lambda i: halving.over_all_sizes(d.spec, d[i].figures))
        kept.append(best)
        for cid in [i for i in ids if i != best and i not in both]:
            ratios = [d.speed(i).ratio for i in (cid, best)]
            why = f"the engine of {d[best].plan.name}, and not faster: {ratios[0]:.2f}x, {ratios[1]:.2f}x"
            d.drop(cid, "finalists", why)
    return d.by_speed(kept)


def _unproven(d: Draft) -> list[str]:
    """Nobody was timed and checked in time: the final measurement takes the most promising that were built, first the
    one that is the least likely to lose accuracy."""

    def expected(cid: str) -> float:
        known = d[cid].speed
        return d[cid].plan.prior if known is None else 1 / known.ratio

    late = [cid for cid, c in d.state.candidates.items() if c.built is not None and c.late]
    late = sorted((i for i in late if d.facts.has_data or d[i].plan.lossless), key=expected)
    safe = sorted(late, key=lambda i: is_quantized(d[i].plan))[:1]
    chosen = [*safe, *(i for i in late if i not in safe)][:MOST_FINALISTS]
    for cid in chosen:
        d.put(cid, refused=None)
        d.note(cid, "finalists", "unproven", "the time did not hold its check; the final measurement tells")
    return chosen
