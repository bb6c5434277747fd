"""Ways to serve a model: which fits this job, and why, by its own figures. A rule, not an opinion: every row says the
figure that it goes by, or that there is none. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_Json = Mapping[str, Any]

_CACHE = re.compile(r"(^|[._/])(past|present|kv_cache|cache)([._/]|$)|past_key|present_key", re.IGNORECASE)
_WORTH = 1.05  # over the way that is simpler
_FITS = 0.8  # of the machine's memory


@dataclass(frozen=True)
class Facts:
    """`tensors`: names of the model's inputs and outputs. `models`: of the job's chain; `apart`: whether an engine of
    each ships."""

    memory_mb: float | None
    cores: int
    tensors: Sequence[str] = ()
    models: int = 1
    apart: bool = False


def patterns(data: _Json, facts: Facts) -> list[dict[str, Any]]:
    """`data`: of the stage `load_test`. Rows {pattern, fits, why, figures}; `fits` is None where nothing tells."""
    return [
        _single(data),
        _instances(data),
        _dynamic(data),
        _static(data),
        _ensemble(facts),
        _parallel(data, facts),
        _continuous(facts),
    ]


def _ensemble(facts: Facts) -> dict[str, Any]:
    if facts.models == 1:
        return _row(
            "ensemble",
            None,
            "for a chain of models whose arrays stay on the server: the Triton bundle of two engines holds one "
            "(`then`), and a job may have one (`chain`); this job has one model",
        )
    why = (
        "an engine of each model ships, and the Triton bundle is an ensemble of them"
        if facts.apart
        else "one engine of the whole chain ships: nothing is handed over between its models"
    )
    return _row("ensemble", facts.apart, why, models=facts.models)


def _row(pattern: str, fits: bool | None, why: str, **figures: Any) -> dict[str, Any]:
    return {"pattern": pattern, "fits": fits, "why": why, "figures": figures}


def _setup(data: _Json) -> _Json:
    found: _Json = data["engine"]["setup"]
    return found


def _rate(side: _Json | None) -> float | None:
    return ((side or {}).get("goodput") or {}).get("rate")


def _yields(tried: Iterable[_Json]) -> float | None:
    return max((t["yields_per_second"] for t in tried if t["yields_per_second"]), default=None)


def _alone(tried: Sequence[_Json]) -> list[_Json]:
    """One instance, one by one."""
    return [t for t in tried if t["instances"] == 1 and t["max_batch"] == 1]


def _single(data: _Json) -> dict[str, Any]:
    setup, tried = _setup(data), data["tried"]
    rate = next((t["goodput_seen"] for t in _alone(tried) if t["goodput_seen"] is not None), None)
    fits = setup["instances"] == 1 and setup["max_batch"] == 1
    why = "nothing that was tried was proven to serve more" if fits else "another way was proven to serve more"
    return _row("single instance, one by one", fits, why, goodput_seen=rate, goodput=_rate(data["engine"]))


def _instances(data: _Json) -> dict[str, Any]:
    setup, tried = _setup(data), data["tried"]
    many = _yields(t for t in tried if t["instances"] > 1)
    one = _yields(t for t in tried if t["instances"] == 1)
    told = {"yields_with_several": many, "yields_with_one": one, "instances": setup["instances"]}
    if setup["instances"] > 1:
        gain = _brought(data, "instances × threads")
        why = f"{setup['instances']} instances serve the traffic best"
        return _row("several instances", True, why + (f": {gain}" if gain else ""), **told)
    if many is None:
        return _row("several instances", None, "not measured: the machine has one core, or the time ran out", **told)
    why = "they were not proven to keep the limit at a higher rate than one instance on all cores"
    if one is not None and many < one * _WORTH:
        why = f"several yield {many:.4g}/s at most, one yields {one:.4g}/s"
    return _row("several instances", False, why, **told)


def _dynamic(data: _Json) -> dict[str, Any]:
    setup, tried = _setup(data), data["tried"]
    larger = _yields(t for t in tried if t["max_batch"] > 1)
    one = _yields(t for t in tried if t["max_batch"] == 1)
    told = {
        "max_batch": setup["max_batch"],
        "max_delay_ms": setup["max_delay_ms"],
        "yields": larger,
        "yields_alone": one,
    }
    if setup["max_batch"] > 1:
        gain = _brought(data, "max_batch")
        why = "batches that form while instances are busy serve the traffic best"
        return _row("dynamic batching", True, why + (f": {gain}" if gain else ""), **told)
    if larger is None:
        reason = data["serving"]["settings"].get("reason") or "no batch above 1 was measured"
        return _row("dynamic batching", False, str(reason), **told)
    why = "batches were not proven to keep the limit at a higher rate"
    if one is not None and larger < one * _WORTH:
        why = f"batches yield {larger:.4g} requests/s at most, one by one it is {one:.4g}"
    return _row("dynamic batching", False, why, **told)


def _static(data: _Json) -> dict[str, Any]:
    static, dynamic = _rate(data["static"]), _rate(data["engine"])
    told = {"goodput": static, "goodput_dynamic": dynamic}
    if static is None or dynamic is None:
        return _row("static batching", None, data["reasons"].get("static", "not measured"), **told)
    setup = data["static"]["setup"]
    how = f"batches of {setup['max_batch']}, waited for up to {setup['max_delay_ms']:g} ms"
    if static > _WORTH * dynamic:
        return _row("static batching", True, f"{how}: {static:.4g}/s within the limit by a short look", **told)
    why = f"{how}: {static:.4g}/s within the limit by a short look, batches as they form {dynamic:.4g}/s"
    return _row("static batching", False, why, **told)


def _parallel(data: _Json, facts: Facts) -> dict[str, Any]:
    """A model is spread over several devices where one does not hold it."""
    needed, there = data["engine"]["memory_mb"], facts.memory_mb
    told = {"memory_mb": needed, "machine_memory_mb": None if there is None else round(there)}
    if needed is None or there is None:
        return _row("model parallel", None, "the memory it takes was not measured", **told)
    fits = needed > _FITS * there
    why = "it takes nearly all memory of this machine" if fits else "one machine holds it: nothing is to be spread"
    return _row("model parallel", fits, why, **told)


def _continuous(facts: Facts) -> dict[str, Any]:
    """Requests that take many steps each join and leave a running batch."""
    cache = [name for name in facts.tensors if _CACHE.search(name)]
    if cache:
        why = (
            f"it keeps a state from step to step ({', '.join(cache[:3])}): answers take many steps each, and a server "
            "that lets requests join between steps serves more; the batcher here batches single steps"
        )
        return _row("continuous batching", True, why, tensors=cache[:8])
    return _row("continuous batching", False, "an answer takes one step: there is nothing to join in between")


def _brought(data: _Json, setting: str) -> str | None:
    found = next((b for b in data["serving"]["brought"] if b["setting"] == setting), None)
    if found is None or found["goodput_without"] is None:
        return None
    ratio = found["ratio"]
    return f"{ratio:.2f} × the rate without" if ratio is not None else "without, no rate keeps the limit"
