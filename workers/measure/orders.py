"""An engine called in several orders of shapes, each with a freshly loaded session, beside the original's answers:
what a call answers must not depend on which call came first, nor on its shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from app.domain.failures import StageFailure
from workers.kernel import Session
from workers.measure.accuracy import Kind, OutputComparison, check_outputs, output_kind
from workers.measure.losses import percent
from workers.measure.probes import Probe

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Probed = tuple[Probe, Arrays, Arrays]

SHORTEST_FIRST, LONGEST_FIRST, TYPICAL_FIRST = "shortest first", "longest first", "typical first"
_CONFIDENCE = 0.95


def orders_of(probed: Sequence[Probed], *, thorough: bool) -> dict[str, list[int]]:
    """Order → which probes are called, one after the other. Up and down and in turns, so that every shape follows
    smaller and larger ones."""
    every = sorted(range(len(probed)), key=lambda i: sum(a.size for a in probed[i][1].values()))
    up = [i for i in every if 0 not in probed[i][0].sizes.values()]
    empty = [i for i in every if i not in up]  # not the first calls: they decide nothing that a later one could not
    if not thorough:
        return {SHORTEST_FIRST: [*up, *empty, *up[:-1]]}
    typical = next(i for i in up if probed[i][0].label == "typical")
    turns = [i for pair in zip(up, reversed(up), strict=True) for i in pair]
    return {
        SHORTEST_FIRST: [*up, *empty, *up[:-1]],
        LONGEST_FIRST: [*reversed(up), *empty, *up],
        TYPICAL_FIRST: [typical, *turns, *empty, typical],
    }


def compared(
    load: Callable[[], Session],
    probed: Sequence[Probed],
    *,
    thorough: bool,
    time_is_up: Callable[[], bool] = lambda: False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """(entries, the orders that were tried before `time_is_up`; the first one always). One entry a shape: {label, dims,
    sizes, batch, in_use, outputs {name: {kind, orders {order: figures}}}, failed {order: why}}. Figures: of the worst
    call, in percent (see `_figures`).

    Raises StageFailure where the engine cannot be loaded.
    """
    if not probed:
        return [], []
    wanted = next(outputs for probe, _, outputs in reversed(probed) if probe.label == "typical")
    kinds = {name: output_kind(name, values) for name, values in wanted.items()}
    entries = {
        p.label: {
            "label": p.label,
            "dims": p.dims,
            "sizes": p.sizes,
            "batch": p.batch,
            "in_use": p.in_use,
            "outputs": {name: {"kind": str(kind), "orders": {}} for name, kind in kinds.items()},
            "failed": {},
        }
        for p, _, _ in reversed(probed)
    }
    tried: list[str] = []
    for order, calls in orders_of(probed, thorough=thorough).items():
        if tried and time_is_up():
            break
        tried.append(order)
        session = load()
        try:
            for i in calls:
                _called(session, probed[i], order, kinds, entries[probed[i][0].label])
        finally:
            session.close()
    return list(reversed(entries.values())), tried


def _called(session: Session, probed: Probed, order: str, kinds: Mapping[str, Kind], entry: dict[str, Any]) -> None:
    """Write down how far one call's answers are from the original's, or that there are none."""
    probe, feeds, wanted = probed
    try:
        answer = session.run(dict(feeds))
        broken = check_outputs(wanted, answer, 0)
        why = None if broken is None else broken.detail
    except StageFailure as failure:
        if not failure.cacheable:
            raise
        why = failure.detail
    if why is not None:
        entry["failed"].setdefault(order, why)
        return
    for name, a in wanted.items():
        if a.size:
            comparison = OutputComparison(name, kinds[name])
            comparison.add(a, answer[name], probe.batch)
            known = entry["outputs"][name]["orders"].setdefault(order, {})
            for measure, loss in _figures(comparison, probe.batch).items():
                known[measure] = max(loss, known.get(measure, 0.0))


def _figures(comparison: OutputComparison, batch: int) -> dict[str, float]:
    """Losses in percent: `normalized_error` and `cosine` of floats; `agreement`, the share of answers that differ, less
    what chance may have added to so few (the lower end of its exact 95 % bound). One sample that differs shows none."""
    told = comparison.to_json()
    figures = {}
    if "normalized_error" in told:
        figures["normalized_error"] = percent(told["normalized_error"])
        figures["cosine"] = percent(1 - told["cosine"])
    if "agreement" in told and batch > 1:
        column = comparison.column("agreement")
        figures["agreement"] = percent(at_least(float((1 - column).sum()), len(column)))
    return figures


def at_least(hits: float, trials: int) -> float:
    """The lower end of the exact one-sided 95 % bound of a proportion (Clopper and Pearson 1934)."""
    count = math.floor(hits + 1e-9)
    if count == 0 or trials == 0:
        return 0.0
    low, high = 0.0, count / trials
    for _ in range(40):
        p = (low + high) / 2
        below = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(count))
        low, high = (p, high) if 1 - below < 1 - _CONFIDENCE else (low, p)
    return low
