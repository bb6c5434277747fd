"""Winning accuracy back where a quantized candidate loses more than the job allows: the most sensitive nodes in higher
precision, equalization, other calibration, whichever is expected to gain most for its time (`ways`). Trained weights,
the most expensive way, come after all others of all candidates, and nodes of what was trained after them. Until the
limit holds or the time is over. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from workers.candidates import Candidate
from workers.search import checking, halving, limits, ranking, requantized, ways
from workers.search.draft import Draft
from workers.search.requests import Answer, Judge, Make, Rank, Request, TryShapes
from workers.search.state import Mending, Phase
from workers.search.timing import shall_shrink

PHASE = "win back"


def begin(d: Draft) -> None:
    """Those that are faster than the best accurate one and lose too much."""
    best = d.best()
    lost = [i for i in d.by_speed(d.alive()) if d[i].accuracy is not None and requantized.is_quantized(d[i].plan)]
    lost = [i for i in lost if halving.over_limit(d.spec, d[i].loss) and not d[i].mending_tried]
    d.state.queue, d.state.mended, d.state.untrained = tuple(_low_first(d, lost)), (), ()
    d.state.reached = best[1].low if best else 0.0
    d.state.phase = Phase.MENDING


def _low_first(d: Draft, ids: Sequence[str]) -> list[str]:
    """Of those with one graph the one first whose other nodes compute in the lower precision: what is kept does, too.
    (As long as nothing is kept they are about as fast as each other.)"""
    place = {cid: at for at, cid in enumerate(ids)}
    graphs: dict[str, list[str]] = {}
    for cid in ids:
        built = d[cid].built
        assert built is not None
        graphs.setdefault(built.graph, []).append(cid)
    first = {cid: min(place[i] for i in same) for same in graphs.values() for cid in same}
    return sorted(ids, key=lambda cid: (first[cid], d[cid].plan.rest == "fp32", place[cid]))


def ask(d: Draft) -> Request | None:
    """None where nobody is left to mend."""
    while d.state.mending is not None or d.state.queue or d.state.untrained:
        if d.state.mending is None and d.state.queue:
            cid, d.state.queue = d.state.queue[0], d.state.queue[1:]
            if _worth_it(d, cid):
                _start(d, cid)
            continue
        if d.state.mending is None:
            cid, d.state.untrained = d.state.untrained[0], d.state.untrained[1:]
            _start_training(d, cid)
            continue
        request = _next(d)
        if request is not None:
            return request
        _finish(d)
    return None


def _worth_it(d: Draft, cid: str) -> bool:
    found = d[cid]
    if not _fast_enough(d, cid) or not d.spec.quantization.win_back:
        return False
    if d.over(d.deadlines.search_until) or found.loss.get("source") == "synthetic":
        return False
    whose = d.state.in_vain.get(_graph(d, cid))
    if whose is not None:
        d.note(cid, PHASE, "not tried", f"it is the graph of {whose}, which could not be mended")
        return False
    twin = next((i for i in _mended_from(d) if _is_twin(d, i, cid)), None)
    if twin is not None:
        d.note(cid, PHASE, "not tried", f"it is the graph of {twin}, which was mended")
        return False
    assert found.built is not None
    share = limits.KEEPING if found.built.reuses else limits.MENDING
    if d.search_left < share * sum(found.built.seconds):
        d.state.exhausted = True
        d.note(cid, PHASE, "not tried", "the time left does not hold making its graph once more")
        return False
    return True


def _fast_enough(d: Draft, cid: str) -> bool:
    reached = d.state.reached
    floor = reached * limits.WIN_BACK_GAIN if reached else 0.0 if shall_shrink(d) else 1.0
    return d.speed(cid).high >= floor


def _until(d: Draft) -> float:
    """There is just the time left then to time what is mended."""
    return d.deadlines.search_until - limits.TIMINGS_KEPT * d.state.seconds_each


def _start(d: Draft, cid: str) -> None:
    d.put(cid, mending_tried=True)
    until = _until(d)
    samples = sensitivity_samples(d.state.sample_ms, d.left(until))
    found = ways.in_order(d, cid, samples)
    hopeless = [way.candidate.name for way in found if way.candidate is not None and not ways.worth_it(way)]
    if hopeless:
        d.note(cid, PHASE, "not tried", f"hardly expected to bring its loss within the limit: {'; '.join(hopeless)}")
    remaking = limits.REMAKING * ways.quantizing_seconds(d, cid)
    d.state.mending = Mending(cid, until, tuple(filter(ways.worth_it, found)), remaking)


def _next(d: Draft) -> Request | None:
    """The next request for the one that is being mended; None where it is over."""
    while True:
        mending = d.state.mending
        assert mending is not None
        if mending.trying is not None:
            request = _tried(d, mending.trying)
            if request is not None:
                return request
            _judged(d, mending.trying)
        elif mending.ranking:
            rank = _rank(d, mending)
            if rank is not None:
                return rank
            _change(d, ranking=False)
        elif mending.keep and not d.over(mending.until):
            _try(d, requantized.kept(d[mending.graph_of].plan, mending.ranked[: mending.keep]))
        elif mending.ways and mending.best is None:
            _next_way(d, mending)
        else:
            return None


def _change(d: Draft, **changes: object) -> Mending:
    assert d.state.mending is not None
    found = d.state.mending = replace(d.state.mending, **changes)  # type: ignore[arg-type]  # names of its fields
    return found


def _next_way(d: Draft, mending: Mending) -> None:
    way = mending.ways[0].candidate
    mending = _change(d, ways=mending.ways[1:], keep=0)
    if d.over(mending.until):
        _change(d, ways=())
    elif way is None:
        _change(d, ranking=True)
    elif d.left(mending.until) < mending.remaking:
        d.note(mending.of, PHASE, "not tried", f"{way.name}: the time left does not hold calibrating anew")
        _change(d, ways=tuple(w for w in mending.ways if w.candidate is None))
    else:
        _try(d, way)


def _try(d: Draft, candidate: Candidate) -> None:
    mending = _change(d, trying=candidate.id)
    d.add(candidate, base=mending.graph_of)


def _tried(d: Draft, cid: str) -> Request | None:
    """What is still to be asked of the one that is tried."""
    if d[cid].refused is not None:
        return None
    if d[cid].built is None:
        assert d.state.mending is not None
        return Make(d.subject(cid), d.state.mending.until)
    return checking.ask(d, cid)


def _judged(d: Draft, cid: str) -> None:
    mending = _change(d, trying=None)
    limit = d.spec.validation.max_accuracy_loss_percent
    keeps = checking.keeps(d, cid) and d[cid].loss.get("loss_percent", 100.0) <= limit
    if keeps:
        if mending.best is not None:
            why = f"{d[cid].plan.name} keeps the limit, too, and is quantized further"
            d.drop(mending.best, PHASE, why)
        d.note(cid, PHASE, "keeps the limit")
        mending = _change(d, best=cid)
    elif mending.training and mending.trained is None and d[cid].accuracy is not None:
        mending = _change(d, trained=cid, ranking=True)  # other nodes cost its accuracy than before
    if mending.keep:
        _number(d, mending, keeps=keeps)


def _start_training(d: Draft, cid: str) -> None:
    """Try trained weights, if anything can still come of it and the time holds it. All candidates start from one
    training."""
    candidate = requantized.trained(d.facts, d[cid].plan)
    if candidate is None or not _fast_enough(d, cid):
        return
    remaking = limits.REMAKING * ways.quantizing_seconds(d, cid)
    why_not = _why_untrained(d, cid, candidate, remaking)
    if why_not is not None:
        d.note(cid, PHASE, "not trained", why_not)
        return
    d.state.mending = Mending(cid, _until(d), (), remaking, training=True)
    _try(d, candidate)


def _why_untrained(d: Draft, cid: str, candidate: Candidate, remaking: float) -> str | None:
    same = [c for c in d.state.candidates.values() if c.plan.steps[:1] == candidate.steps[:1]]
    left, needed = d.left(_until(d)), remaking
    if same and not any(c.built for c in same):
        return f"{same[0].plan.name} could not be made"
    if not same:
        whole, least = training_seconds(d)
        needed, most = remaking + whole, d.spec.quantization.training.max_seconds
        if d.speed(cid).ratio < limits.TRAINING_PAYS * d.state.reached:
            return "it is hardly faster than what keeps the limit without"
        if least > most:
            return f"the fewest steps are expected to take {least:.0f} s, and training may take {most} s"
    if left < needed:
        return f"training is expected to take {needed:.0f} s, and {left:.0f} s are left to the search"
    return None


def training_seconds(d: Draft) -> tuple[float, float]:
    """That a training is expected to take, all in all; and its fewest steps, with what comes before them."""
    terms, facts = d.spec.quantization.training, d.facts
    sample_s = limits.TRAINING * d.state.sample_ms / 1e3 + limits.TRAINING_SAMPLE_S
    whole = min(terms.epochs * facts.training_samples * sample_s, terms.max_seconds)
    return whole + limits.TRAINING_CALLS_S, limits.TRAINING_LEAST * sample_s


def _number(d: Draft, mending: Mending, *, keeps: bool) -> None:
    """Of the nodes that are kept next: twice as many, until so many hold; then between a number that was too small and
    one that holds: fewer nodes kept are faster."""
    most = _having(mending.shares, limits.MOST_KEPT)
    failed = mending.failed if keeps else mending.keep
    held = mending.keep if keeps else mending.held
    if not held:
        keep = min(2 * mending.keep, most) if mending.keep < most else 0
    else:
        fewer = mending.shares[held - 1] - (mending.shares[failed - 1] if failed else 0.0)
        worth_it = held - failed > max(1, held // 4) and fewer > limits.FEW_KEPT
        keep = (failed + held) // 2 if worth_it else 0
    _change(d, failed=failed, held=held, keep=keep)


def _having(shares: Sequence[float], limit: float) -> int:
    """How many of the nodes have at most this share of the work."""
    return sum(share <= limit for share in shares)


def _rank(d: Draft, mending: Mending) -> Rank | None:
    """Dynamic quantization needs no data: without any it is measured on random inputs, and the check on real ones
    tells."""
    _, step = requantized.quantization(d[mending.of].plan)
    needs_data = step.options.get("recipe") != "dynamic_int8"
    if d.over(mending.until) or (needs_data and not d.facts.has_calibration):
        return None
    half = d.now + d.left(mending.until) / 2
    return Rank(d.subject(mending.graph_of), sensitivity_samples(d.state.sample_ms, d.left(mending.until)), half)


def sensitivity_samples(sample_ms: float, left: float) -> int:
    """As many as the time holds, a power of two: the same job asks for the same ones again."""
    call_s = limits.SENSITIVITY_CALLS * limits.SIMULATED * sample_ms / 1e3
    if not call_s:
        return limits.SENSITIVITY_SAMPLES
    held = limits.SENSITIVITY_SHARE * left / call_s
    return int(2 ** math.floor(math.log2(min(max(held, limits.FEWEST_SAMPLES), limits.SENSITIVITY_SAMPLES))))


def _finish(d: Draft) -> None:
    mending = d.state.mending
    assert mending is not None
    d.state.mending = None
    if mending.best is None:
        d.state.in_vain = {**d.state.in_vain, _graph(d, mending.of): mending.of}
        if d.spec.quantization.training.mode == "auto" and not mending.training:
            d.state.untrained = (*d.state.untrained, mending.of)
        return
    d.state.mended = (*d.state.mended, mending.best)
    d.state.reached = max(d.state.reached, limits.MENDED * d.speed(mending.of).ratio)


def take(d: Draft, request: Make | Judge | TryShapes | Rank, answer: Answer) -> None:
    if isinstance(request, Make):
        d.built(request.subject.id, answer)
    elif isinstance(request, Rank):
        _ranked(d, answer)
    else:
        checking.take(d, request, answer)


def _ranked(d: Draft, answer: Answer) -> None:
    mending = d.state.mending
    assert mending is not None
    if "why_not" in answer:
        d.note(mending.graph_of, PHASE, "no sensitivity", str(answer["why_not"]))
        _change(d, ranking=False)
        return
    nodes = answer["nodes"]
    worst = [{"node": n["name"], "error": n["error"]} for n in nodes[:10]]
    d.note(mending.graph_of, PHASE, "sensitivity", worst=worst)
    ranked, shares = ranking.in_order(nodes, squared=answer.get("metric") == "normalized_error")
    first, most = max(1, _having(shares, limits.FIRST_KEPT)), _having(shares, limits.MOST_KEPT)
    _change(d, ranking=False, ranked=ranked, shares=shares, keep=first if first <= most else 0)


def _graph(d: Draft, cid: str) -> tuple[str, str]:
    built = d[cid].built
    assert built is not None
    return built.graph, json.dumps(built.runtime, sort_keys=True)


def _made_from(d: Draft, cid: str) -> str | None:
    """The engine that it was mended from, of those that were timed."""
    base = d[cid].base
    while base is not None and d[base].speed is None:
        base = d[base].base
    return base


def _mended_from(d: Draft) -> list[str]:
    return [base for cid in d.state.mended if (base := _made_from(d, cid)) is not None]


def _is_twin(d: Draft, mended: str, cid: str) -> bool:
    """One graph, and what differs, how the rest of it computes, made this one no faster."""
    return _graph(d, mended)[0] == _graph(d, cid)[0] and d.speed(cid).low <= d.speed(mended).ratio


def untimed(d: Draft, mended: Sequence[str]) -> None:
    """What the time did not hold a timing of, though it keeps the accuracy, goes by the speed of the engine that it was
    made from: the final measurement tells."""
    for cid in mended:
        found = d[cid]
        base = _made_from(d, cid)
        if found.late and found.speed is None and base is not None:
            expected = d.speed(base).scaled(limits.MENDED)
            d.put(cid, refused=None, speed=expected)
            ratio = round(expected.ratio, 4)
            d.note(cid, "timing of the mended ones", "expected", "by the engine it was made from", ratio=ratio)
