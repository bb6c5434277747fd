"""In which order nodes go back into higher precision: those first that mend most for the time they cost. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from workers.search.limits import LITTLE_ERROR


def in_order(nodes: Sequence[Mapping[str, Any]], *, squared: bool = False) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Names of the nodes whose quantization does any harm, and the share of the work of all of them that the first one,
    the first two, … have.

    `nodes`: `name`, `error` and, where it is known, `work`, the worst first. Where nothing is known of their work they
    stay in this order. A node that hardly hurts comes after those that do, however little it has to do: each change
    of precision costs something, too. `squared`: whether it is the errors' squares that add up over nodes, as those of
    independent noise do.
    """
    harmful = [n for n in nodes if n["error"]]
    known = [float(n["work"]) for n in harmful if n.get("work") is not None]
    if not known or not sum(known):
        return tuple(str(n["name"]) for n in harmful), tuple((i + 1) / len(harmful) for i in range(len(harmful)))
    mean = fmean(known)
    costs = [_cost(n, mean) for n in harmful]
    errors = [float(n["error"]) ** (2 if squared else 1) for n in harmful]
    little = LITTLE_ERROR * fmean(errors)
    order = sorted(range(len(harmful)), key=lambda i: (errors[i] < little, -errors[i] / costs[i], i))
    done, total, shares = 0.0, sum(costs), []
    for i in order:
        done += costs[i]
        shares.append(done / total)
    return tuple(str(harmful[i]["name"]) for i in order), tuple(shares)


def _cost(node: Mapping[str, Any], mean: float) -> float:
    """What it costs to keep the node, in the mean node's work: at least as much as that, for its values are rounded
    before and after it, and what else is kept decides how often."""
    work = node.get("work")
    return 1.0 if work is None else max(float(work) / mean, 1.0)
