"""The best configuration of a sweep: latency against throughput, under the user's limits. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Configuration = Mapping[str, Any]

TIE = 0.03  # figures nearer than this are the same on a machine that is not quiet
_OVERLAP_TIE = 0.05  # likewise, where the passes of one reach those of the other
BATCHING_GAIN = 1.10
RELATIVE_PRICE = 1.0  # per hour, where no price is known


@dataclass(frozen=True)
class Choice:
    """`best`: None where nothing fits; `nearest` then misses by least, and `relax` says which limits would have to
    give: field of the spec → the value that it would meet (None where that is not known). `pareto`: ids of those that
    no other beats in both latency and throughput, by growing latency."""

    best: Configuration | None
    reason: str
    pareto: list[str] = field(default_factory=list)
    nearest: Configuration | None = None
    relax: dict[str, float | None] = field(default_factory=dict)


def choose(
    configurations: Sequence[Configuration],
    objective: str,
    p99_limit_ms: float | None = None,
    min_throughput_qps: float | None = None,
    max_memory_mb: float | None = None,
    price_per_hour: float | None = None,
    *,
    batch: int | None = None,
) -> Choice:
    """Of the measured `configurations` (as the sweep stage writes them), by `objective`:

    `latency`: the lowest p50 at `batch` (the smallest measured where None); `throughput`: the most samples per second;
    `cost`: the lowest cost per million samples (a machine costs the same whatever it does, so that is the throughput
    again, with a price on it). All within the limits; a p99 keeps its limit where its bound does (`p99_bound`).
    Among those that cannot be told from the best (within 3 %, or within 5 % and their passes overlap) the least memory
    wins, then the smaller batch; the reason then says so, and what the best one's figure is.
    """
    measured = [c for c in configurations if c.get("status") == "measured"]
    if not measured:
        reasons = sorted({str(c.get("reason")) for c in configurations})
        return Choice(None, "no configuration was measured: " + ("; ".join(reasons) or "none was tried"))
    front = pareto(measured)
    asked = _at_batch(measured, batch) if objective == "latency" else measured
    memory = _memory_key(measured)
    limits = _limits(p99_limit_ms, min_throughput_qps, max_memory_mb, memory)
    fitting = [c for c in asked if not _missed(c, limits)]
    if not fitting:
        nearest = min(asked, key=lambda c: (max(m.distance for m in _missed(c, limits)), _latency(c)))
        missed = _missed(nearest, limits)
        reason = f"no configuration keeps the limits; the nearest is {_named(nearest)}: "
        reason += "; ".join(m.reason for m in missed)
        return Choice(None, reason, front, nearest, {m.limit.field: m.value for m in missed})
    if objective == "latency":
        best, lead = _best(fitting, _latency, "p50_by_pass")
        why = _claim(best, lead, "the lowest p50", lambda c: f"{_latency(c):.4g} ms at batch {c['batch']}")
    elif objective == "throughput":
        best, lead = _best(fitting, _per_sample, "throughput_by_pass")
        why = _claim(best, lead, "the highest throughput", lambda c: f"{c['throughput_qps']:.4g} samples/s")
    else:
        best, lead = _best(fitting, _per_sample, "throughput_by_pass")

        def cost(c: Configuration) -> str:
            return f"{cost_per_million(c['throughput_qps'], price_per_hour):.4g} per million samples"

        why = _claim(best, lead, "the lowest cost", cost)
        if price_per_hour is None:
            why += f", relative: no price was given, {RELATIVE_PRICE:g} per hour was taken"
    kept = ", ".join(limit.words for limit in limits)
    return Choice(best, f"{_named(best)} has {why}" + (f", within {kept}" if kept else ""), front)


def cost_per_million(throughput_qps: float, price_per_hour: float | None) -> float:
    """Of a million samples at a price per hour, 1.0 where None."""
    return (RELATIVE_PRICE if price_per_hour is None else price_per_hour) / 3600 / throughput_qps * 1e6


def pareto(measured: Sequence[Configuration]) -> list[str]:
    """Ids of those that none has both less latency (p50) and more throughput than, by growing latency."""
    front: list[str] = []
    most = 0.0
    for c in sorted(measured, key=lambda c: (_latency(c), -c["throughput_qps"])):
        if c["throughput_qps"] > most:
            front.append(c["id"])
            most = c["throughput_qps"]
    return front


def batching_pays(configurations: Sequence[Configuration], chosen: Configuration) -> bool:
    """Whether the batch chosen brings at least 10 % more throughput than batch 1 in the same layout, or in the best
    one where that was not measured."""
    single = [c for c in configurations if c.get("status") == "measured" and c["batch"] == 1]
    same = [c for c in single if (c["instances"], c["threads"]) == (chosen["instances"], chosen["threads"])]
    most = max((c["throughput_qps"] for c in same or single), default=None)
    return chosen["batch"] > 1 and most is not None and bool(chosen["throughput_qps"] >= BATCHING_GAIN * most)


@dataclass(frozen=True)
class _Limit:
    """`field`: of the job's spec; `key`: of a configuration; `most`: whether it is an upper limit."""

    field: str
    key: str
    value: float
    unit: str
    most: bool

    @property
    def words(self) -> str:
        name = {"p99_bound_ms": "p99", "memory_mb": "memory", "gpu_memory_mb": "GPU memory"}.get(self.key, self.key)
        return f"{name} {'≤' if self.most else '≥'} {self.value:g} {self.unit}"


@dataclass(frozen=True)
class _Miss:
    """`distance`: relative to the limit, infinite where the value is not known."""

    limit: _Limit
    value: float | None
    distance: float
    reason: str


def _memory_key(configurations: Sequence[Configuration]) -> str:
    """What `max_memory_mb` limits: the GPU's memory where the engine runs on one."""
    return "memory_mb" if all(c.get("gpu_memory_mb") is None for c in configurations) else "gpu_memory_mb"


def _limits(p99_ms: float | None, qps: float | None, memory_mb: float | None, memory: str) -> list[_Limit]:
    given = (
        ("constraints.p99_latency_ms", "p99_bound_ms", p99_ms, "ms", True),
        ("constraints.min_throughput_qps", "throughput_qps", qps, "samples/s", False),
        ("constraints.max_memory_mb", memory, memory_mb, "MB", True),
    )
    return [_Limit(name, key, value, unit, most) for name, key, value, unit, most in given if value is not None]


def _missed(configuration: Configuration, limits: Sequence[_Limit]) -> list[_Miss]:
    misses = []
    for limit in limits:
        value = configuration.get(limit.key)
        if value is None:
            why = (configuration.get("reasons") or {}).get(limit.key, "not measured")
            misses.append(_Miss(limit, None, float("inf"), f"{limit.key} is not known ({why})"))
        elif (value > limit.value) if limit.most else (value < limit.value):
            distance = abs(value - limit.value) / limit.value
            misses.append(_Miss(limit, value, distance, f"{limit.key} {value:.4g}, limit {limit.value:g}"))
    return misses


def _at_batch(measured: Sequence[Configuration], batch: int | None) -> Sequence[Configuration]:
    """Those at `batch`, or at the smallest where none was measured at it."""
    sizes = {c["batch"] for c in measured}
    wanted = batch if batch in sizes else min(sizes)
    return [c for c in measured if c["batch"] == wanted]


def _best(
    fitting: Sequence[Configuration], cost: Callable[[Configuration], float], passes: str
) -> tuple[Configuration, Configuration]:
    """(Who wins, who leads by the bare figure). `passes`: where each configuration keeps the figure of every pass."""
    lead = min(fitting, key=cost)
    near = [c for c in fitting if cost(c) <= cost(lead) * (1 + _OVERLAP_TIE)]
    tied = [c for c in near if cost(c) <= cost(lead) * (1 + TIE) or _meet(c, lead, passes)]
    return min(tied, key=lambda c: (_memory(c), c["batch"], cost(c))), lead


def _meet(one: Configuration, other: Configuration, passes: str) -> bool:
    """Whether what was seen of them in single passes overlaps; False where less than two are known of either."""
    a, b = ([v for v in c.get(passes) or () if v is not None] for c in (one, other))
    return min(len(a), len(b)) >= 2 and min(a) <= max(b) and min(b) <= max(a)


def _claim(best: Configuration, lead: Configuration, superlative: str, figure: Callable[[Configuration], str]) -> str:
    """What the winner has, true of the table that it stands in."""
    if best is lead:
        return f"{superlative}: {figure(best)}"
    why = "less memory" if _memory(best) < _memory(lead) else "a smaller batch"
    if _memory(best) == _memory(lead) and best["batch"] == lead["batch"]:
        why = "the same memory"
    return f"{figure(best)}, which cannot be told from {superlative} ({figure(lead)}, {_named(lead)}), with {why}"


def _per_sample(configuration: Configuration) -> float:
    return 1.0 / float(configuration["throughput_qps"])


def _memory(configuration: Configuration) -> float:
    """What is not known is taken as the most."""
    memory = configuration.get(_memory_key([configuration]))
    return float("inf") if memory is None else float(memory)


def _latency(configuration: Configuration) -> float:
    """p50 in ms, or the mean where the samples do not carry a median."""
    p50 = configuration.get("p50_ms")
    return float(configuration["mean_ms"] if p50 is None else p50)


def _named(c: Configuration) -> str:
    return f"{c['instances']} instance(s) × {c['threads']} thread(s) at batch {c['batch']}"
