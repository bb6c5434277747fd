"""From a sweep to the report's `deployment_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.report import DeploymentConfig
from app.domain.spec import OptimizationSpec
from workers.measure.deployment import Choice, batching_pays, choose, cost_per_million
from workers.measure.winner import throughput_of
from workers.pipeline.load import serving_of
from workers.pipeline.outcome import Explanation, Proof

_NOT_SHOWN = ("runtime", "failed", "not_finite")  # of a configuration in the report's table


def deployment_of(proof: Proof, explanation: Explanation) -> DeploymentConfig:
    """How to run what ships, as far as it was found out."""
    config = deployment_config(
        explanation.deployment.data if explanation.deployment else None,
        missing=explanation.reasons.get("deployment"),
        picked_backend=proof.backend,
        precision=proof.precision,
        runtime=proof.runtime,
        dynamic_batch=bool(proof.export.data.get("dynamic_batch")),
        spec=proof.spec,
    )
    if proof.spec.traffic is not None:
        config.serving = serving_of(explanation)
        if config.serving is None:
            config.reasons["serving"] = explanation.reasons.get("traffic", "not measured")
    if explanation.bundle_lacks is not None:
        config.reasons["serving"] = "; ".join(
            why for why in (config.reasons.get("serving"), explanation.bundle_lacks) if why
        )
    return config


def deployment_config(
    sweep_data: Mapping[str, Any] | None,
    *,
    missing: str | None = None,
    picked_backend: str,
    precision: str,
    runtime: Mapping[str, Any],
    dynamic_batch: bool,
    spec: OptimizationSpec,
) -> DeploymentConfig:
    """`sweep_data`: the sweep stage's data; None where there is none, and `missing` says why. `runtime`: of the picked
    engine, kept where nothing better was found. `dynamic_batch`: whether the engine takes any batch size.

    Where no configuration keeps the limits, the nearest miss is shown, and `reasons["choice"]` says what to relax.
    """
    config = DeploymentConfig(
        batch_size=spec.benchmark.batch_sizes[0],
        precision=precision,
        dynamic_batching=False,
        instances_per_gpu=None,
        backend=picked_backend,
        runtime=dict(runtime),
    )
    if sweep_data is None:
        why = missing or "no reason known"
        config.reasons = {"choice": f"batch sizes, instances and threads were not swept: {why}"}
        return config
    configurations = sweep_data["configurations"]
    choice = _choice(configurations, spec)
    front = set(choice.pareto)
    config.sweep = [
        {**{k: v for k, v in c.items() if k not in _NOT_SHOWN}, "pareto": c["id"] in front} for c in configurations
    ]
    config.reasons = {"choice": _words(choice, sweep_data)}
    shown = choice.best or choice.nearest
    if shown is None:
        return config
    config.batch_size = shown["batch"]
    config.instances, config.threads_per_instance = shown["instances"], shown["threads"]
    config.runtime = dict(shown["runtime"])
    config.p50_latency_ms, config.p99_latency_ms = shown["p50_ms"], shown["p99_ms"]
    for name in ("p50", "p99"):
        if shown[f"{name}_ms"] is None:
            config.reasons[f"{name}_latency_ms"] = shown["reasons"].get(f"{name}_ms", "not measured")
    config.throughput_qps, config.throughput_ci, config.reasons["throughput_qps"] = throughput_of(shown)
    config.memory_mb = shown["memory_mb"]
    config.gpu_memory_mb = shown.get("gpu_memory_mb")
    _price(config, spec)
    config.dynamic_batching = dynamic_batch and batching_pays(configurations, shown)
    config.reasons["dynamic_batching"] = _batching(config, dynamic_batch)
    if sweep_data.get("threads_matter", True):
        config.reasons["instances_per_gpu"] = "measured on a CPU: see `instances` and `threads_per_instance`"
    else:
        config.instances_per_gpu = shown["instances"]
    return config


def _choice(configurations: Sequence[Mapping[str, Any]], spec: OptimizationSpec) -> Choice:
    """By the job's objective. For latency the batch is the first one asked for, where it was measured."""
    limits = spec.constraints
    return choose(
        configurations,
        spec.objective,
        limits.p99_latency_ms,
        limits.min_throughput_qps,
        limits.max_memory_mb,
        spec.cost.price_per_hour if spec.cost else None,
        batch=spec.benchmark.batch_sizes[0],
    )


def _words(choice: Choice, sweep_data: Mapping[str, Any]) -> str:
    words = choice.reason
    if choice.relax:
        known = {field: value for field, value in choice.relax.items() if value is not None}
        words += ". Relax " + ", ".join(f"{f} to {v:.4g}" for f, v in known.items()) if known else ""
    if not sweep_data.get("complete", True):
        words += ". The sweep is not complete: the time ran out"
    return words


def _price(config: DeploymentConfig, spec: OptimizationSpec) -> None:
    """Shown where a price is given, or where the job asks for the lowest cost."""
    if config.throughput_qps is None:
        return
    if spec.cost is not None:
        config.cost_per_million = float(f"{cost_per_million(config.throughput_qps, spec.cost.price_per_hour):.6g}")
        config.currency = spec.cost.currency
        config.reasons["cost_per_million"] = (
            "of samples at `throughput_qps`, all instances busy all the time: no latency limit is held then"
            + (", see the report's `traffic.cost`" if spec.traffic is not None else "; `traffic` of a job tells one")
        )
    elif spec.objective == "cost":
        config.cost_per_million = float(f"{cost_per_million(config.throughput_qps, None):.6g}")
        config.reasons["cost_per_million"] = "relative: no `cost.price_per_hour` was given, 1.0 per hour was taken"
    else:
        config.reasons["cost_per_million"] = "no `cost.price_per_hour` was given"


def _batching(config: DeploymentConfig, dynamic_batch: bool) -> str:
    if not dynamic_batch:
        return f"the engine takes batches of {config.batch_size} only"
    if config.dynamic_batching:
        return f"batch {config.batch_size} brings at least 10 % more samples per second than batch 1"
    if config.batch_size == 1:
        return "batch 1 was chosen"
    return f"batch {config.batch_size} brings less than 10 % more samples per second than batch 1"
