"""The ways to win a candidate's accuracy back, in the order of what each is expected to gain for its time. Pure.

A way multiplies the loss by a factor that is not known before; over the models where it was measured the factor's
logarithm lies about normally. So its chance to bring a loss within the limit follows from how far over it that is:
other ranges take away a tenth or a quarter, nodes in higher precision a half and more. What it would gain then is the
speed over the best that keeps the limit already; what it takes is told by the calls that were made.
"""

from __future__ import annotations

import math

from workers.candidates import Candidate
from workers.search import limits, requantized
from workers.search.draft import Draft
from workers.search.limits import Factor
from workers.search.state import Way


def in_order(d: Draft, cid: str, samples: int) -> tuple[Way, ...]:
    """Of a candidate that was built, timed and checked; `samples`: that its sensitivity would be measured on."""
    plan, facts = d[cid].plan, d.facts
    found = [Way(None, _gain(d, cid, limits.KEPT, limits.MENDED), _keeping_seconds(d, cid, samples))]
    for candidates, factor, seconds in (
        (requantized.equalized(facts, plan), limits.EQUALIZED, 2 * quantizing_seconds(d, cid)),
        (requantized.calibrated_otherwise(facts, plan), limits.RECALIBRATED, quantizing_seconds(d, cid)),
    ):
        found += [_way(d, cid, candidate, factor, seconds) for candidate in candidates]
    return tuple(sorted(found, key=lambda way: -way.gain / way.seconds))


def worth_it(way: Way) -> bool:
    """Nodes in higher precision always are: one node may be all that hurts."""
    return way.candidate is None or way.gain >= limits.LEAST_GAIN


def chance(factor: Factor, over: float) -> float:
    """That a loss, `over` times the limit, keeps it afterwards."""
    mean, deviation = factor
    return 0.5 * math.erfc((math.log(over) + mean) / (deviation * math.sqrt(2)))


def quantizing_seconds(d: Draft, cid: str) -> float:
    """What quantizing anew takes: as it did, or an inference a sample where the first came from the cache."""
    built = d[cid].built
    assert built is not None
    index, step = requantized.quantization(d[cid].plan)
    samples = min(int(step.options.get("max_samples", 0)), d.facts.calibrating)
    return max(built.seconds[index], samples * d.state.sample_ms / 1e3)


def _way(d: Draft, cid: str, candidate: Candidate, factor: Factor, seconds: float) -> Way:
    built = d[cid].built
    assert built is not None
    return Way(candidate, _gain(d, cid, factor, 1.0), seconds + built.seconds[-1] + _checking_seconds(d, cid))


def _gain(d: Draft, cid: str, factor: Factor, speed: float) -> float:
    """Expected, as a logarithm. `speed`: what is left of the candidate's own."""
    limit, loss = d.spec.validation.max_accuracy_loss_percent, d[cid].loss.get("loss_percent")
    over = math.inf if loss is None else max(loss / max(limit, limits.LEAST_LIMIT), 1.0)
    beaten = math.log(d.speed(cid).high * speed / (d.state.reached or 1.0))
    return (chance(factor, over) if math.isfinite(over) else 0.0) * max(beaten, limits.LITTLE_GAIN)


def _keeping_seconds(d: Draft, cid: str, samples: int) -> float:
    """Its sensitivity, and the first number of nodes."""
    built = d[cid].built
    assert built is not None
    ranking = limits.SENSITIVITY_CALLS * limits.SIMULATED * samples * d.state.sample_ms / 1e3
    making = limits.KEEPING * sum(built.seconds) if built.reuses else quantizing_seconds(d, cid) + built.seconds[-1]
    return limits.CALL_S + ranking + making + _checking_seconds(d, cid)


def _checking_seconds(d: Draft, cid: str) -> float:
    return limits.CALL_S + d[cid].all_seconds
