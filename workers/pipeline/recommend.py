"""Advice that follows from this job's figures, and only from them: each sentence names the figure it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers import devices
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.checks import LOSS
from workers.pipeline.outcome import Optimization
from workers.search.objective import ratio_of

_MEMORY_BOUND = 0.5  # of the memory's bandwidth, spent on reading the weights once
_BEYOND_CACHES = 64_000_000  # bytes of weights, below which they may never leave the processor's caches
_LAYER_SHARE = 0.3  # of the time in one layer, from which on it is worth a word
_OP_SHARE = 0.6
_COMPUTE_BOUND = 0.1  # of the memory's bandwidth
_DENSE = ("Conv", "FusedConv", "Convolution", "MatMul", "FusedMatMul", "Gemm", "FullyConnected")
_MOSTLY = 0.5  # of the time
_SCALES = 1.5  # by all threads over one, at the least: then the work can be shared out
_BATCHING = 1.2  # of the samples per second of batch size 1, from which on a larger batch is worth a word
_TIMES_THE_LIMIT, _MOST_LOSS, _LEAST_CHOICE = 5.0, 10.0, 1.0  # percent: a loss beyond is no choice that anybody has
_SLOW_MS = 10.0  # from which on a GPU's launches and copies are small beside the work


def recommend(found: Optimization) -> list[str]:
    """Sentences a person can act on. Where the machine was too busy for a claim, none names a gain."""
    quiet = (found.benchmark.data.get("disturbance") or {}).get("claim", True)
    gains = [*_out_of_reach(found), *_deployment(found)] if quiet else []
    advice = [*found.warnings, *_kept_original(found), *gains, *_next_precision(found), *_sensitive(found)]
    advice += [*_narrowed(found), *_limits(found), *_evidence(found)]
    return list(dict.fromkeys(advice))


def _kept_original(found: Optimization) -> Iterator[str]:
    if found.verdict.picked == "baseline" and found.verdict.unclaimed is None:
        tried = [f"{r.plan.name}: {'; '.join(r.tried.reasons)}" for r in found.runs if r.tried.reasons]
        because = " — ".join(tried[:8]) or "there was nothing to try"
        yield f"Keep the original: nothing that was tried is faster within the limits ({because})."


def _out_of_reach(found: Optimization) -> Iterator[str]:
    """What ran faster than the pick and could not ship, and what it would need."""
    if found.verdict.unclaimed is not None:
        return
    best = _ratio(found, found.picked) if found.picked else None
    floor = max(best["ratio"] if best else 1.0, 1.0)
    faster = [r for r in found.runs if r is not found.picked and (_ratio(found, r) or {"low": 0.0})["low"] > floor]
    without_data = [r for r in faster if (r.tried.accuracy or {}).get("source") == "synthetic" and not r.plan.lossless]
    if without_data:
        run = _fastest(found, without_data)
        yield (
            f"Give validation data: {run.plan.name} ran {_gain(found, run)} as fast as the original, and only data can "
            "show whether it keeps the accuracy."
        )
    lossy = [r for r in faster if r not in without_data and _is_a_choice(found, r)]
    if lossy:
        run = _fastest(found, lossy)
        accuracy = run.tried.accuracy or {}
        interval = accuracy.get("loss_ci")
        shown = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        yield (
            f"{run.plan.name} ran {_gain(found, run)} as fast as the original but loses "
            f"{accuracy['loss_percent']:.2f} %{shown} ({accuracy.get('metric')}, {accuracy.get('samples')} samples); "
            "allow that loss to get it."
        )


def _is_a_choice(found: Optimization, run: CandidateRun) -> bool:
    """Over the limit, and near enough to it that somebody may want it all the same."""
    limit = found.spec.validation.max_accuracy_loss_percent
    loss = (run.tried.accuracy or {}).get("loss_percent")
    return loss is not None and limit < loss <= min(_MOST_LOSS, max(_TIMES_THE_LIMIT * limit, _LEAST_CHOICE))


def _narrowed(found: Optimization) -> Iterator[str]:
    """What the data could not show of a pick that computes in narrower types than the model's."""
    if found.picked and found.picked.plan.narrows:
        yield (
            f"Mind values beyond those of the validation data: {found.picked.plan.name} was judged on those alone, and "
            f"{found.picked.plan.narrows}."
        )


def _next_precision(found: Optimization) -> Iterator[str]:
    """The precision that was not tried, and what it would need."""
    if any("calibration data" in s.reason for s in found.plan.skipped):
        yield "Give calibration data (some hundred typical samples): static int8 could then be tried."
    if not found.case.quantized:
        yield from devices.of_backend(found.baseline_backend).wanted(found.hardware, found.case)


def _sensitive(found: Optimization) -> Iterator[str]:
    measured = next((r for r in found.runs if r.sensitivity is not None), None)
    if measured is None or measured.sensitivity is None:
        return
    nodes = [n for n in measured.sensitivity.data["nodes"] if n["error"]][:3]
    if nodes:
        names = ", ".join(f"{n['name']} ({n['op_type']}, {n['error']:.3g})" for n in nodes)
        yield (
            f"The layers that int8 hurts most are {names} (error of the outputs when that layer alone is quantized); "
            "quantization-aware training, or `quantization.keep_nodes`, should begin there."
        )


def _limits(found: Optimization) -> Iterator[str]:
    """What the shipped engine waits for."""
    data: Mapping[str, Any] = found.explanation.profile.data if found.explanation.profile else {}
    share, threads = data.get("weight_bandwidth_share"), _gain_by_threads(found)
    from_memory = data.get("engine_bytes", 0) >= _BEYOND_CACHES
    if share is not None and from_memory and _MEMORY_BOUND <= share <= 1.0:
        size, bandwidth = data["engine_bytes"] / 1e6, data["copy_bytes_per_s"] / 1e9
        yield (
            f"At batch size {data['batch']} the engine waits for memory: reading its {size:.0f} MB once an inference "
            f"takes {100 * share:.0f} % of the {bandwidth:.1f} GB/s that this machine's memory gave. What may help is "
            "fewer bytes an answer: weights in fewer bits, or larger batches."
        )
    distorted = data.get("distorted") is not None or not data.get("layers_ms")
    by_op: Mapping[str, float] = {} if distorted else data.get("by_op") or {}
    dense = sum(part for op, part in by_op.items() if op in _DENSE)
    if (
        share is not None
        and share <= _COMPUTE_BOUND
        and data["inference_ms"] >= _SLOW_MS
        and dense >= _MOSTLY
        and threads is not None
        and threads[1] >= _SCALES
    ):
        yield (
            f"Computing sets the {data['inference_ms']:.0f} ms of an inference at batch size {data['batch']}: "
            f"convolutions and products take {100 * dense:.0f} % of it by the library's profiler, reading the weights "
            f"would take {100 * share:.1f} %, and all threads run it {threads[0]:.1f}x [{threads[1]:.1f}, "
            f"{threads[2]:.1f}] as fast as one. A GPU is worth a try (`target.device` cuda); none was measured."
        )
    if distorted or data["layers_ms"] < _MOSTLY * data["inference_ms"]:
        return
    layers = data.get("layers") or []
    if layers and layers[0]["share"] >= _LAYER_SHARE and (data.get("layer_count") or 0) > 1:
        top = layers[0]
        yield (
            f"One layer takes {100 * top['share']:.0f} % of the layers' time, by the library's profiler: {top['name']} "
            f"({top['op_type']}). Begin there."
        )
    op, part = max(by_op.items(), key=lambda item: item[1], default=("", 0.0))
    if part >= _OP_SHARE:
        yield f"{op} takes {100 * part:.0f} % of the layers' time, by the library's own profiler."


def _deployment(found: Optimization) -> Iterator[str]:
    """A gain that needs no other engine, only another way to run it."""
    measured = _swept(found)
    widest = max((c["threads"] for c in measured if c["instances"] == 1), default=0)
    alone = {c["batch"]: c for c in measured if (c["instances"], c["threads"]) == (1, widest)}
    if 1 not in alone:
        return
    gains = {b: g for b, c in alone.items() if b > 1 and (g := _over_passes(c, alone[1], "throughput_by_pass"))}
    batch = max(gains, key=lambda b: gains[b][1], default=None)
    if batch is not None and gains[batch][1] >= _BATCHING:
        gain, low, high = gains[batch]
        yield (
            f"Batch requests where latency allows: at batch size {batch} one caller gets "
            f"{alone[batch]['throughput_qps']:.4g} samples/s, {gain:.1f}x [{low:.1f}, {high:.1f}] of batch size 1 (the "
            "interval is that of the sweep's passes)."
        )


def _swept(found: Optimization) -> list[Mapping[str, Any]]:
    """The configurations that the sweep measured."""
    data: Mapping[str, Any] = found.explanation.deployment.data if found.explanation.deployment else {}
    return [c for c in data.get("configurations", ()) if c.get("status") == "measured"]


def _gain_by_threads(found: Optimization) -> tuple[float, float, float] | None:
    """Of one instance at the batch size that counts: by how much the most threads are faster than one, with its
    interval over the sweep's passes; None where both were not measured."""
    batch = int(found.verdict.primary_batch)
    alone = {c["threads"]: c for c in _swept(found) if c["instances"] == 1 and c["batch"] == batch}
    if 1 not in alone or len(alone) < 2:
        return None
    return _over_passes(alone[max(alone)], alone[1], "throughput_by_pass")


def _over_passes(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> tuple[float, float, float] | None:
    """(ratio, low, high) of what was seen in the passes of two configurations; None where there are less than two."""
    a, b = ([float(v) for v in c.get(name) or () if v] for c in (one, other))
    if min(len(a), len(b)) < 2:
        return None
    return sum(a) / len(a) / (sum(b) / len(b)), min(a) / max(b), max(a) / min(b)


def _evidence(found: Optimization) -> Iterator[str]:
    checks = found.picked.tried.checks if found.picked else []
    for check in checks:
        if check.name == LOSS and not check.proven:
            yield f"That the engine keeps the accuracy is {check.reason}."
    if found.search.exhausted or found.benchmark.data.get("shortened"):
        yield f"The budget of {found.spec.budget_seconds} s ran out before everything was tried: raise it."


def _ratio(found: Optimization, run: CandidateRun | None) -> Mapping[str, Any] | None:
    """The gain over the original, of the full measurement or of the last short timing."""
    at = (run.figures.get("batches") or {}).get(found.verdict.primary_batch) if run else None
    return ratio_of(found.spec, at) if at else None


def _gain(found: Optimization, run: CandidateRun) -> str:
    """With its interval, the batch size, and whether it is only of a short timing."""
    ratio, how = _ratio(found, run), "" if run.tried.figures else ", by a short timing"
    assert ratio is not None
    at = f"at batch size {found.verdict.primary_batch}{how}"
    return f"{ratio['ratio']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}] ({at})"


def _fastest(found: Optimization, runs: list[CandidateRun]) -> CandidateRun:
    return max(runs, key=lambda r: float((_ratio(found, r) or {"ratio": 0.0})["ratio"]))
