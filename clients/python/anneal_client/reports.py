"""What the service answers. Made from openapi.json by `clients/python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Any, Literal

from anneal_client.answers import Answer


class Analysis(Answer, defaults={"notes": [], "ops": {}}):
    """The model as it came, and where it was measured."""

    hardware: str
    kind: str | None
    model: str
    notes: list[str]
    ops: dict[str, int]
    opset: int | None
    original_latency_ms: float | None
    original_size_mb: float
    parameters: int | None


class AppliedOptimization(Answer, defaults={"details": {}}):
    """One part of the shipped engine. `impact` was measured by leaving the part out; None where it could not be.

    `latency_ratio`: p50 of the shipped engine over that of the engine without this part, with its 95 % interval, at the
    batch size of the final metrics. `accuracy_cost_percent`: the loss with the part less the loss without it, in
    percentage points of the job's metric; the interval is conservative, from both losses' own. `without_loss_percent`:
    the loss of the engine that lacks it."""

    accuracy_cost_ci: list[float] | None
    accuracy_cost_percent: float | None
    compared_with: str | None
    details: dict[str, Any]
    impact: str | None
    latency_ratio: float | None
    latency_ratio_ci: list[float] | None
    name: str
    reason: str | None
    without_loss_percent: float | None


class AtBatch(Answer):
    """`speedup`: of the bundle, in the full measurement; None at a batch size that the job did not ask for. The two
    engines' own are of what `measured` says: "full", or "short timing" where one of them is of the search."""

    answered_by: str
    batch: int
    large_speedup: float | None
    measured: str
    small_speedup: float | None
    speedup: float | None
    speedup_ci: list[float] | None


class ByBatch(Answer, defaults={"costs": {}}):
    """Two engines in one bundle: which batch goes to which, and what each brings. `border`: the two batch sizes between
    which one overtakes the other; nothing was timed between them. `costs`: size_mb, memory_mb, cold_start_ms of both,
    and of the one engine that would ship alone (`alone`, None where none would)."""

    batches: list[AtBatch]
    border: list[int]
    costs: dict[str, Any]
    engines: list[EngineShare]


class CandidateReport(
    Answer,
    defaults={"batches": {}, "checks": [], "details": {}, "nodes_kept": [], "runtime": {}, "search": [], "shapes": []},
):
    """One tried configuration. `status`: picked | kept | dropped; `reason` says why, always. `accuracy`: of finalists
    on the samples that confirm, and `accuracy_in_search` on those that the search chose by; else on the latter.

    `measured`: "full", "short timing" (figures of the search, fewer samples) or None; `measured_at`: when, which is
    before this job where the figures were stored already. `made_by`: the worker that built its engine, which may be
    another one than the job's, or an earlier job's. `search`: what the search found and decided of it, in order.
    `prior`: the latency over the baseline's that was expected before anything ran."""

    accuracy: dict[str, Any] | None
    accuracy_in_search: dict[str, Any] | None
    backend: str
    batches: dict[str, Any]
    checks: list[dict[str, Any]]
    cold_start_ms: float | None
    details: dict[str, Any]
    failure: dict[str, Any] | None
    gpu_memory_mb: float | None
    id: str
    made_by: str | None
    measured: str | None
    measured_at: str | None
    memory_mb: float | None
    name: str
    nodes_kept: list[str]
    precision: str
    prior: float | None
    reason: str
    recipe: str
    runtime: dict[str, Any]
    search: list[dict[str, Any]]
    shapes: list[dict[str, Any]]
    size_mb: float | None
    status: str


class ChainReport(Answer):
    """What was optimized as one: the models in order. `deploy`: what ships, one engine of the whole (`merged`) or one
    of each model (`ensemble`); where it is not what the job `asked` for, the `reason`. The original that everything is
    compared with is the chain of the originals in one graph."""

    asked: Literal["merged", "ensemble"]
    deploy: Literal["merged", "ensemble"]
    models: list[ChainedModel]
    reason: str | None


class ChainedEngine(Answer, defaults={"runtime": {}}):
    """The engine of one model of a chain: in this `folder` of the bundle, loaded by this `backend` with these `runtime`
    options."""

    backend: str
    folder: str
    runtime: dict[str, Any]
    size_mb: float


class ChainedModel(Answer, defaults={"connect": {}}):
    """One model of a chain. `connect`: its input → the output of the model before that goes there; `taken`: its inputs
    that are the whole's. Tensors as {name, dtype, shape}. `engine`: its own; None where one of the whole ships."""

    connect: dict[str, str]
    engine: ChainedEngine | None
    format: str
    id: str
    inputs: list[dict[str, Any]]
    name: str
    outputs: list[dict[str, Any]]
    sha256: str
    taken: list[str]


class ComparedTarget(Answer, defaults={"engine_ids": []}):
    """One machine. `goodput`: requests per second within the limit, `goodput_interval` [kept, seen to exceed it].
    `per_million_requests` and its interval: as `traffic.cost` of its job's report has them. `rank`: 1 is the cheapest,
    None where no cost is known, and `reason` says why. `cheapest_too`: its cost cannot be told from the lowest.
    `cold_start`: from nothing to the first answer, as its report's `traffic.cold_start`."""

    cheapest_too: bool | None
    cold_start: dict[str, Any] | None
    engine_ids: list[str]
    goodput: float | None
    goodput_interval: list[float | None] | None
    hardware: str
    job_id: str
    machines: int | None
    original_per_million_requests: float | None
    original_proven: bool | None
    per_hour: float | None
    per_million_requests: float | None
    per_million_requests_interval: list[float | None] | None
    per_million_samples: float | None
    price_per_hour: float
    proven: bool | None
    rank: int | None
    reason: str | None
    speedup: str | None
    status: str


class Comparison(Answer, defaults={"missing": []}):
    """`cheapest`: hardware of the lowest cost per million requests within the limit; None where no cost is known.
    `told_apart`: whether every other known cost's interval lies above it; None where there is no other.
    `cheapest_for_rate`: hardware that serves the wanted rate for the least per hour, in whole machines; None where no
    rate is wanted. `missing`: targets without a cost. `targets`: the cheapest first, in the job's order where there is
    no cost."""

    cheapest: str | None
    cheapest_for_rate: str | None
    currency: str
    headline: str
    job_id: str
    limit: str
    missing: list[str]
    rate_per_second: float | None
    status: str
    targets: list[ComparedTarget]
    told_apart: bool | None


class DeploymentConfig(Answer, defaults={"reasons": {}, "runtime": {}, "sweep": []}):
    """How to run the shipped engine on this machine: the best configuration of the sweep by the job's objective.
    `runtime`: what each instance loads the engine with. `throughput_qps`: samples per second of all instances together,
    `memory_mb`: of all their processes, `gpu_memory_mb`: what these take of the GPU. `cost_per_million`: of a million
    samples, in `currency` (None: relative). `sweep`: every configuration that was tried, `pareto` where none has both
    less latency and more throughput. `serving`: how to serve the job's traffic: `settings` (the bundle's
    `serving.json`), the `goodput` they were measured to keep, in requests per second (`goodput_over_http`: by
    the bundle's own server), what each setting `brought`."""

    backend: str | None
    batch_size: int
    cost_per_million: float | None
    currency: str | None
    dynamic_batching: bool
    gpu_memory_mb: float | None
    instances: int | None
    instances_per_gpu: int | None
    memory_mb: float | None
    p50_latency_ms: float | None
    p99_latency_ms: float | None
    precision: str
    reasons: dict[str, str]
    runtime: dict[str, Any]
    serving: dict[str, Any] | None
    sweep: list[dict[str, Any]]
    threads_per_instance: int | None
    throughput_ci: list[float] | None
    throughput_qps: float | None


class EngineShare(Answer):
    """One of two engines in the bundle: a candidate, or the original (`baseline`). It answers batches of `least` to
    `most` samples (None: any beyond)."""

    accuracy_loss_percent: float | None
    accuracy_verdict: str | None
    backend: str
    candidate: str
    least: int
    most: int | None
    name: str
    precision: str
    size_mb: float


class FinalMetrics(Answer, defaults={"accepts": {}, "reasons": {}}):
    """Of the shipped engine, at `batch_size` and `shape` (of each input, the batch included); `speedup` against the
    baseline, e.g. "2.2x", both called as the bundle's `infer.py` calls: `bound` {p50_ms, speedup} is the cheaper call.
    `memory_mb`: of the process; `gpu_memory_mb`: what it takes of a GPU, None without one. `accuracy_value` and
    `original_accuracy_value`: of the metric itself, by `accuracy_basis` (labels, references, agreement, synthetic), on
    the same samples. `accuracy_verdict`: whether it is proven or unproven that the loss keeps the job's limit; the
    bound is what `accuracy_confidence` cannot exclude. `accepts`: where the bundle takes fewer sizes
    than the original, for each axis of an input [least, most], None for any."""

    accepts: dict[str, list[list[int | None] | None]]
    accuracy_basis: str | None
    accuracy_confidence: float | None
    accuracy_loss_bound_percent: float | None
    accuracy_loss_ci: list[float] | None
    accuracy_loss_percent: float | None
    accuracy_metric: str | None
    accuracy_samples: int | None
    accuracy_value: float | None
    accuracy_verdict: str | None
    accuracy_verdict_reason: str | None
    batch_size: int | None
    bound: dict[str, Any] | None
    gpu_memory_mb: float | None
    latency_ms: float | None
    memory_mb: float | None
    original_accuracy_value: float | None
    original_latency_ms: float | None
    reasons: dict[str, str]
    shape: dict[str, list[int]] | None
    size_mb: float | None
    speedup: str
    speedup_ci: list[float] | None
    speedup_proven: bool | None
    throughput_qps: float | None


class LimitCost(Answer):
    """What serving costs at the job's limit: `price_per_hour` / (goodput × 3600) × 10⁶. `per_million_requests`: at the
    highest rate that keeps the limit; the interval is that of the rate (its lower end None: no rate was seen to exceed
    the limit). `per_million_samples`: of samples, of which a request holds `samples_per_request`. `proven`: whether the
    limit is, at this rate. `original_per_million_requests`: of the original, within the same limit, proven or not.
    `machines`: that the wanted rate takes, for `per_hour` together. `reason`: why no cost is claimed."""

    currency: str
    goodput: float | None
    limit: str
    machines: int | None
    original_per_million_requests: float | None
    original_proven: bool | None
    per_hour: float | None
    per_million_requests: float | None
    per_million_requests_interval: list[float | None] | None
    per_million_samples: float | None
    per_million_samples_interval: list[float | None] | None
    price_per_hour: float
    proven: bool | None
    reason: str | None
    samples_per_request: float | None


class Report(
    Answer,
    defaults={
        "bundles": {},
        "claim": True,
        "compatibility": [],
        "nodes_kept": [],
        "not_explained": {},
        "sensitivity": [],
        "shapes": [],
        "warnings": [],
    },
):
    """`not_explained`: what of the explanation is missing (`ablation`, `deployment`, `profile`, `traffic`,
    `cold_start`), and why:
    the engine was proven before. `traffic`: where the job tells one. `compatibility`: of backends that the worker could
    ask but not run, whether they take the model: {backend, accepted, how, refused, precisions, changes, …}. `bundles`:
    of the kinds beside `python`, {backend, notes, tried: {requests, executions, largest_difference} where a server was
    there to try it in}, or {reason} why the engine has none."""

    analysis: Analysis
    baseline: dict[str, Any]
    budget_exhausted: bool
    bundles: dict[str, dict[str, Any]]
    by_batch: ByBatch | None
    candidates: list[CandidateReport]
    chain: ChainReport | None
    checks: list[dict[str, Any]]
    claim: bool
    compatibility: list[dict[str, Any]]
    deployment_config: DeploymentConfig | None
    disturbance: dict[str, Any] | None
    environment: dict[str, Any]
    final_metrics: FinalMetrics | None
    job_id: str
    method: dict[str, Any]
    nodes_kept: list[str]
    noisy: bool
    not_explained: dict[str, str]
    optimizations_applied: list[AppliedOptimization]
    pareto: list[str]
    picked: str | None
    profile: dict[str, Any] | None
    recommendations: list[str]
    search: SearchReport | None
    sensitivity: list[dict[str, Any]]
    shapes: list[ShapeReport]
    skipped: list[dict[str, str]]
    stages: list[StageReport]
    traffic: TrafficReport | None
    warnings: list[str]


class SearchReport(Answer):
    """How the candidates were searched. `order`: ids as they were tried. `phases`: {name, seconds, candidates}.
    `verdict_seconds`: until it was proven what ships; the rest of `spent_seconds` explains it and finds out how to
    deploy it."""

    budget_seconds: int
    exhausted: bool
    finalists: list[str]
    order: list[str]
    phases: list[dict[str, Any]]
    spent_seconds: float
    strategy: str
    verdict_seconds: float | None


class ShapeReport(Answer):
    """The shipped engine beside the original at one shape. `in_use`: the data or the job have it, or nothing is known
    of what is in use; there the engine is never slower, or it does not ship. `holds`: whether it is not slower here
    (None: not known, see `reason`). `answers`: how far the engine's are from the original's here."""

    answers: str | None
    batch: int
    dims: dict[str, list[int]]
    holds: bool | None
    in_use: bool
    label: str
    latency_ms: float | None
    original_ms: float | None
    reason: str | None
    speedup: float | None
    speedup_ci: list[float] | None


class StageReport(Answer, defaults={"notes": []}):
    """`made_at`, `made_by`: when and by which worker its result was made, which may be an earlier job's (`cached`)."""

    cached: bool
    candidate: str | None
    made_at: str | None
    made_by: str | None
    name: str
    notes: list[str]
    seconds: float


class TrafficReport(
    Answer,
    defaults={
        "brought": [],
        "conditions": {},
        "generator": {},
        "method": {},
        "padding": {},
        "patterns": [],
        "reasons": {},
        "traffic": {},
        "tried": [],
    },
):
    """The bundle that ships, and the original with its own default settings, under the job's traffic (`traffic`: as it
    was driven). `engine` and `original`: {setup, goodput {rate, interval, proven, confirmed, …}, at_rate, beyond,
    curve, …}; rates are requests per second. `gain`: of the rates within the limit, {ratio, low, high}; None for what
    is not known. `served`: whether the wanted rate is, None where that is not proven; `nearest_rate`: the highest that
    is, `machines`: how many of this kind the wanted rate takes. `http`: the engine by the bundle's own server. `cost`:
    where the job tells a price. `cold_start`: the bundle's server from nothing, in a clean process {alive_seconds,
    ready_seconds, first_answer_seconds, from_zero_seconds (with unpacking), archive_mb, …}. `patterns`: ways to serve,
    which fits and why, by this job's figures. `padding`: what requests of unlike sizes may be filled up to {sizes
    (input → axis → sizes), refused (input → why not)}. `reasons`: why a part of it is missing."""

    brought: list[dict[str, Any]]
    cold_start: dict[str, Any] | None
    conditions: dict[str, Any]
    cost: LimitCost | None
    engine: dict[str, Any] | None
    gain: dict[str, float | None] | None
    generator: dict[str, Any]
    headline: str
    http: dict[str, Any] | None
    machines: int | None
    method: dict[str, str]
    nearest_rate: float | None
    original: dict[str, Any] | None
    padding: dict[str, Any]
    patterns: list[dict[str, Any]]
    reasons: dict[str, str]
    served: bool | None
    static: dict[str, Any] | None
    traffic: dict[str, Any]
    tried: list[dict[str, Any]]
