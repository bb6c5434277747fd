"""Advice that follows from this job's figures, and only from them: each sentence names the figure it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from workers.candidates import BF16_FLAGS, INT8_FLAGS
from workers.pipeline.checks import LOSS
from workers.pipeline.evaluate import CandidateRun
from workers.pipeline.outcome import Optimization
from workers.pipeline.select import ratio_of

_MEMORY_BOUND = 0.5  # of the memory's bandwidth, spent on reading the weights once
_LAYER_SHARE = 0.3  # of the time in one layer, from which on it is worth a word
_OP_SHARE = 0.6
_COMPUTE_BOUND = 0.1  # of the memory's bandwidth
_SLOW_MS = 10.0  # from which on a GPU's launches and copies are small beside the work


def recommend(found: Optimization) -> list[str]:
    """Sentences a person can act on."""
    advice = [
        *found.warnings,
        *_kept_original(found),
        *_out_of_reach(found),
        *_next_precision(found),
        *_sensitive(found),
    ]
    advice += [*_narrowed(found), *_limits(found), *_deployment(found), *_evidence(found)]
    return list(dict.fromkeys(advice))


def _kept_original(found: Optimization) -> Iterator[str]:
    if found.verdict.picked == "baseline":
        tried = [f"{r.plan.name}: {'; '.join(r.tried.reasons)}" for r in found.runs if r.tried.reasons]
        because = " — ".join(tried[:8]) or "there was nothing to try"
        yield f"Keep the original: nothing that was tried is faster within the limits ({because})."


def _out_of_reach(found: Optimization) -> Iterator[str]:
    """What ran faster than the pick and could not ship, and what it would need."""
    best = _ratio(found, found.picked) if found.picked else None
    floor = max(best["ratio"] if best else 1.0, 1.0)
    faster = [r for r in found.runs if r is not found.picked and (_ratio(found, r) or {"low": 0.0})["low"] > floor]
    without_data = [r for r in faster if (r.tried.accuracy or {}).get("source") == "synthetic" and not r.plan.lossless]
    if without_data:
        run = _fastest(found, without_data)
        yield (
            f"Give validation data: {run.plan.name} ran {_gain(found, run):.2f}x as fast as the original, and only "
            "data can show whether it keeps the accuracy."
        )
    limit = found.spec.validation.max_accuracy_loss_percent
    lossy = [
        r for r in faster if ((r.tried.accuracy or {}).get("loss_percent") or 0.0) > limit and r not in without_data
    ]
    if lossy:
        run = _fastest(found, lossy)
        accuracy = run.tried.accuracy or {}
        yield (
            f"{run.plan.name} ran {_gain(found, run):.2f}x as fast as the original but loses "
            f"{accuracy['loss_percent']:.2f} % ({accuracy.get('metric')}, {accuracy.get('samples')} samples); allow "
            "that loss to get it."
        )


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
    isa = set(found.hardware.get("isa") or ())
    if found.hardware.get("kind") != "cpu" or found.case.quantized:
        return
    if not isa & INT8_FLAGS and found.case.wants("int8"):
        yield (
            "Try a machine with VNNI or AMX (x86) or dot-product instructions (Arm) for int8: this one "
            f"({found.hardware.get('cpu_model')}) has none, and int8 gains little without."
        )
    if not isa & BF16_FLAGS and found.case.wants("bf16"):
        model = found.hardware.get("cpu_model")
        yield f"Try a machine with AVX512-BF16 or AMX for bf16: this one ({model}) has neither."


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
    share = data.get("weight_bandwidth_share")
    if share is not None and _MEMORY_BOUND <= share <= 1.0:
        size, bandwidth = data["engine_bytes"] / 1e6, data["copy_bytes_per_s"] / 1e9
        yield (
            f"At batch size {data['batch']} the engine is bound by memory: reading its {size:.0f} MB once an inference "
            f"takes {100 * share:.0f} % of the {bandwidth:.1f} GB/s that this machine's memory gave. Fewer bytes (int8 "
            "or int4 weights) or larger batches help; more cores do not."
        )
    elif share is not None and share <= _COMPUTE_BOUND and data["inference_ms"] >= _SLOW_MS:
        yield (
            f"Computing sets the {data['inference_ms']:.0f} ms of an inference at batch size {data['batch']}: reading "
            f"the weights would take {100 * share:.1f} % of that. More cores help, and so would a GPU computing in "
            "fp16 (a worker with one, and `target.device` cuda); this worker has none."
        )
    layers = data.get("layers") or []
    if layers and layers[0]["share"] >= _LAYER_SHARE and (data.get("layer_count") or 0) > 1:
        top = layers[0]
        yield f"One layer takes {100 * top['share']:.0f} % of the time: {top['name']} ({top['op_type']}). Begin there."
    by_op: Mapping[str, float] = data.get("by_op") or {}
    op, part = max(by_op.items(), key=lambda item: item[1], default=("", 0.0))
    if part >= _OP_SHARE:
        yield f"{op} takes {100 * part:.0f} % of the engine's time (by the library's own profiler)."


def _deployment(found: Optimization) -> Iterator[str]:
    """A gain that needs no other engine, only another way to run it."""
    one, best = _throughput(found, 1), _best_throughput(found)
    if one and best and best[1] >= 1.2 * one:
        yield (
            f"Batch requests where latency allows: at batch size {best[0]} one caller gets {best[1]:.0f} samples/s, "
            f"{best[1] / one:.1f}x of batch size 1."
        )


def _evidence(found: Optimization) -> Iterator[str]:
    checks = found.picked.tried.checks if found.picked else []
    for check in checks:
        if check.name == LOSS and not check.proven:
            yield f"That the engine keeps the accuracy is {check.reason}."
    if found.benchmark.data.get("noisy"):
        yield (
            "The machine was noisy (the baseline differed from itself): measure again on a quiet one, with "
            '`"measure": "again"` (the same job again would answer from the cache).'
        )
    if found.search.exhausted or found.benchmark.data.get("shortened"):
        yield f"The budget of {found.spec.budget_seconds} s ran out before everything was tried: raise it."


def _ratio(found: Optimization, run: CandidateRun | None) -> Mapping[str, Any] | None:
    """The gain over the original, of the full measurement or of the last short timing."""
    at = (run.figures.get("batches") or {}).get(found.verdict.primary_batch) if run else None
    return ratio_of(found.spec, at) if at else None


def _gain(found: Optimization, run: CandidateRun) -> float:
    ratio = _ratio(found, run)
    return float(ratio["ratio"]) if ratio else 0.0


def _fastest(found: Optimization, runs: list[CandidateRun]) -> CandidateRun:
    return max(runs, key=lambda r: _gain(found, r))


def _shipped_batches(found: Optimization) -> Mapping[str, Any]:
    tried = found.picked.tried if found.picked else found.baseline
    return (tried.figures or {}).get("batches") or {}


def _throughput(found: Optimization, batch: int) -> float | None:
    return (_shipped_batches(found).get(str(batch)) or {}).get("throughput_qps")


def _best_throughput(found: Optimization) -> tuple[str, float] | None:
    known = [(b, at["throughput_qps"]) for b, at in _shipped_batches(found).items() if at.get("throughput_qps")]
    return max(known, key=lambda item: item[1], default=None)
