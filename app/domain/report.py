"""The schema of the report. The first block is what platforms parse: fields are added, never removed. A figure that was
not measured is None, with its reason in `reasons` beside it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from app.domain.chain import Deploy


class _Part(BaseModel):
    # What is made here has no other fields; whoever reads a report is told that a later version may.
    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": True})


class Analysis(_Part):
    """The model as it came, and where it was measured."""

    model: str
    original_size_mb: float
    original_latency_ms: float | None
    hardware: str
    parameters: int | None = None
    opset: int | None = None
    kind: str | None = None
    ops: dict[str, int] = {}
    notes: list[str] = []


class AppliedOptimization(_Part):
    """One part of the shipped engine. `impact` was measured by leaving the part out; None where it could not be.

    `latency_ratio`: p50 of the shipped engine over that of the engine without this part, with its 95 % interval, at the
    batch size of the final metrics. `accuracy_cost_percent`: the loss with the part less the loss without it, in
    percentage points of the job's metric; the interval is conservative, from both losses' own. `without_loss_percent`:
    the loss of the engine that lacks it."""

    name: str
    impact: str | None
    reason: str | None = None
    latency_ratio: float | None = None
    latency_ratio_ci: list[float] | None = None
    accuracy_cost_percent: float | None = None
    accuracy_cost_ci: list[float] | None = None
    without_loss_percent: float | None = None
    compared_with: str | None = None
    details: dict[str, Any] = {}


class FinalMetrics(_Part):
    """Of the shipped engine, at `batch_size` and `shape` (of each input, the batch included); `speedup` against the
    baseline, e.g. "2.2x", both called as the bundle's `infer.py` calls: `bound` {p50_ms, speedup} is the cheaper call.
    `memory_mb`: of the process; `gpu_memory_mb`: what it takes of a GPU, None without one. `accuracy_value` and
    `original_accuracy_value`: of the metric itself, by `accuracy_basis` (labels, references, agreement, synthetic), on
    the same samples. `accuracy_verdict`: whether it is proven or unproven that the loss keeps the job's limit; the
    bound is what `accuracy_confidence` cannot exclude. `accepts`: where the bundle takes fewer sizes
    than the original, for each axis of an input [least, most], None for any."""

    latency_ms: float | None
    original_latency_ms: float | None = None
    bound: dict[str, Any] | None = None
    throughput_qps: float | None
    accuracy_loss_percent: float | None
    memory_mb: float | None
    gpu_memory_mb: float | None = None
    speedup: str
    speedup_ci: list[float] | None = None
    speedup_proven: bool | None = None
    size_mb: float | None = None
    batch_size: int | None = None
    shape: dict[str, list[int]] | None = None
    accepts: dict[str, list[list[int | None] | None]] = {}
    accuracy_metric: str | None = None
    accuracy_basis: str | None = None
    accuracy_value: float | None = None
    original_accuracy_value: float | None = None
    accuracy_loss_ci: list[float] | None = None
    accuracy_samples: int | None = None
    accuracy_verdict: str | None = None
    accuracy_verdict_reason: str | None = None
    accuracy_loss_bound_percent: float | None = None
    accuracy_confidence: float | None = None
    reasons: dict[str, str] = {}


class DeploymentConfig(_Part):
    """How to run the shipped engine on this machine: the best configuration of the sweep by the job's objective.
    `runtime`: what each instance loads the engine with. `throughput_qps`: samples per second of all instances together,
    `memory_mb`: of all their processes, `gpu_memory_mb`: what these take of the GPU. `cost_per_million`: of a million
    samples, in `currency` (None: relative). `sweep`: every configuration that was tried, `pareto` where none has both
    less latency and more throughput. `serving`: how to serve the job's traffic: `settings` (the bundle's
    `serving.json`), the `goodput` they were measured to keep, in requests per second (`goodput_over_http`: by
    the bundle's own server), what each setting `brought`."""

    batch_size: int
    precision: str
    dynamic_batching: bool
    instances_per_gpu: int | None
    backend: str | None = None
    runtime: dict[str, Any] = {}
    instances: int | None = None
    threads_per_instance: int | None = None
    p50_latency_ms: float | None = None
    p99_latency_ms: float | None = None
    throughput_qps: float | None = None
    throughput_ci: list[float] | None = None
    cost_per_million: float | None = None
    currency: str | None = None
    memory_mb: float | None = None
    gpu_memory_mb: float | None = None
    serving: dict[str, Any] | None = None
    sweep: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}


class ShapeReport(_Part):
    """The shipped engine beside the original at one shape. `in_use`: the data or the job have it, or nothing is known
    of what is in use; there the engine is never slower, or it does not ship. `holds`: whether it is not slower here
    (None: not known, see `reason`). `answers`: how far the engine's are from the original's here."""

    label: str
    dims: dict[str, list[int]]
    batch: int
    in_use: bool
    original_ms: float | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    speedup_ci: list[float] | None = None
    holds: bool | None = None
    reason: str | None = None
    answers: str | None = None


class EngineShare(_Part):
    """One of two engines in the bundle: a candidate, or the original (`baseline`). It answers batches of `least` to
    `most` samples (None: any beyond)."""

    candidate: str
    name: str
    backend: str
    precision: str
    least: int
    most: int | None
    size_mb: float
    accuracy_loss_percent: float | None = None
    accuracy_verdict: str | None = None


class AtBatch(_Part):
    """`speedup`: of the bundle, in the full measurement; None at a batch size that the job did not ask for. The two
    engines' own are of what `measured` says: "full", or "short timing" where one of them is of the search."""

    batch: int
    answered_by: str
    speedup: float | None = None
    speedup_ci: list[float] | None = None
    small_speedup: float | None = None
    large_speedup: float | None = None
    measured: str


class ByBatch(_Part):
    """Two engines in one bundle: which batch goes to which, and what each brings. `border`: the two batch sizes between
    which one overtakes the other; nothing was timed between them. `costs`: size_mb, memory_mb, cold_start_ms of both,
    and of the one engine that would ship alone (`alone`, None where none would)."""

    engines: list[EngineShare]
    border: list[int]
    batches: list[AtBatch]
    costs: dict[str, Any] = {}


class ChainedEngine(_Part):
    """The engine of one model of a chain: in this `folder` of the bundle, loaded by this `backend` with these `runtime`
    options."""

    folder: str
    backend: str
    size_mb: float
    runtime: dict[str, Any] = {}


class ChainedModel(_Part):
    """One model of a chain. `connect`: its input → the output of the model before that goes there; `taken`: its inputs
    that are the whole's. Tensors as {name, dtype, shape}. `engine`: its own; None where one of the whole ships."""

    id: str
    name: str
    format: str
    sha256: str
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    taken: list[str]
    connect: dict[str, str] = {}
    engine: ChainedEngine | None = None


class ChainReport(_Part):
    """What was optimized as one: the models in order. `deploy`: what ships, one engine of the whole (`merged`) or one
    of each model (`ensemble`); where it is not what the job `asked` for, the `reason`. The original that everything is
    compared with is the chain of the originals in one graph."""

    models: list[ChainedModel]
    deploy: Deploy
    asked: Deploy
    reason: str | None = None


class CandidateReport(_Part):
    """One tried configuration. `status`: picked | kept | dropped; `reason` says why, always. `accuracy`: of finalists
    on the samples that confirm, and `accuracy_in_search` on those that the search chose by; else on the latter.

    `measured`: "full", "short timing" (figures of the search, fewer samples) or None; `measured_at`: when, which is
    before this job where the figures were stored already. `made_by`: the worker that built its engine, which may be
    another one than the job's, or an earlier job's. `search`: what the search found and decided of it, in order.
    `prior`: the latency over the baseline's that was expected before anything ran."""

    id: str
    name: str
    backend: str
    precision: str
    recipe: str
    status: str
    reason: str
    batches: dict[str, Any] = {}
    shapes: list[dict[str, Any]] = []
    accuracy: dict[str, Any] | None = None
    accuracy_in_search: dict[str, Any] | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    gpu_memory_mb: float | None = None
    cold_start_ms: float | None = None
    checks: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    failure: dict[str, Any] | None = None
    runtime: dict[str, Any] = {}
    prior: float | None = None
    measured: str | None = None
    measured_at: str | None = None
    made_by: str | None = None
    nodes_kept: list[str] = []
    search: list[dict[str, Any]] = []


class SearchReport(_Part):
    """How the candidates were searched. `order`: ids as they were tried. `phases`: {name, seconds, candidates}.
    `verdict_seconds`: until it was proven what ships; the rest of `spent_seconds` explains it and finds out how to
    deploy it."""

    strategy: str
    budget_seconds: int
    spent_seconds: float
    verdict_seconds: float | None = None
    order: list[str]
    finalists: list[str]
    phases: list[dict[str, Any]]
    exhausted: bool


class LimitCost(_Part):
    """What serving costs at the job's limit: `price_per_hour` / (goodput × 3600) × 10⁶. `per_million_requests`: at the
    highest rate that keeps the limit; the interval is that of the rate (its lower end None: no rate was seen to exceed
    the limit). `per_million_samples`: of samples, of which a request holds `samples_per_request`. `proven`: whether the
    limit is, at this rate. `original_per_million_requests`: of the original, within the same limit, proven or not.
    `machines`: that the wanted rate takes, for `per_hour` together. `reason`: why no cost is claimed."""

    limit: str
    price_per_hour: float
    currency: str
    goodput: float | None = None
    per_million_requests: float | None = None
    per_million_requests_interval: list[float | None] | None = None
    per_million_samples: float | None = None
    per_million_samples_interval: list[float | None] | None = None
    samples_per_request: float | None = None
    proven: bool | None = None
    original_per_million_requests: float | None = None
    original_proven: bool | None = None
    machines: int | None = None
    per_hour: float | None = None
    reason: str | None = None


class TrafficReport(_Part):
    """The bundle that ships, and the original with its own default settings, under the job's traffic (`traffic`: as it
    was driven). `engine` and `original`: {setup, goodput {rate, interval, proven, confirmed, …}, at_rate, beyond,
    curve, …}; rates are requests per second. `gain`: of the rates within the limit, {ratio, low, high}; None for what
    is not known. `served`: whether the wanted rate is, None where that is not proven; `nearest_rate`: the highest that
    is, `machines`: how many of this kind the wanted rate takes. `http`: the engine by the bundle's own server. `cost`:
    where the job tells a price. `cold_start`: the bundle's server from nothing, in a clean process {alive_seconds,
    ready_seconds, first_answer_seconds, from_zero_seconds (with unpacking), archive_mb, …}. `patterns`: ways to serve,
    which fits and why, by this job's figures. `padding`: what requests of unlike sizes may be filled up to {sizes
    (input → axis → sizes), refused (input → why not)}. `reasons`: why a part of it is missing."""

    headline: str
    traffic: dict[str, Any] = {}
    engine: dict[str, Any] | None = None
    original: dict[str, Any] | None = None
    gain: dict[str, float | None] | None = None
    served: bool | None = None
    nearest_rate: float | None = None
    machines: int | None = None
    cost: LimitCost | None = None
    cold_start: dict[str, Any] | None = None
    tried: list[dict[str, Any]] = []
    brought: list[dict[str, Any]] = []
    padding: dict[str, Any] = {}
    static: dict[str, Any] | None = None
    http: dict[str, Any] | None = None
    patterns: list[dict[str, Any]] = []
    generator: dict[str, Any] = {}
    method: dict[str, str] = {}
    conditions: dict[str, Any] = {}
    reasons: dict[str, str] = {}


class StageReport(_Part):
    """`made_at`, `made_by`: when and by which worker its result was made, which may be an earlier job's (`cached`)."""

    name: str
    candidate: str | None
    cached: bool
    seconds: float
    notes: list[str] = []
    made_at: str | None = None
    made_by: str | None = None


class Report(_Part):
    """`not_explained`: what of the explanation is missing (`ablation`, `deployment`, `profile`, `traffic`,
    `cold_start`), and why:
    the engine was proven before. `traffic`: where the job tells one. `compatibility`: of backends that the worker could
    ask but not run, whether they take the model: {backend, accepted, how, refused, precisions, changes, …}. `bundles`:
    of the kinds beside `python`, {backend, notes, tried: {requests, executions, largest_difference} where a server was
    there to try it in}, or {reason} why the engine has none."""

    analysis: Analysis
    optimizations_applied: list[AppliedOptimization]
    final_metrics: FinalMetrics | None
    deployment_config: DeploymentConfig | None
    recommendations: list[str]
    warnings: list[str] = []
    job_id: str
    picked: str | None
    candidates: list[CandidateReport]
    skipped: list[dict[str, str]]
    baseline: dict[str, Any]
    checks: list[dict[str, Any]]
    pareto: list[str]
    environment: dict[str, Any]
    method: dict[str, Any]
    stages: list[StageReport]
    noisy: bool
    budget_exhausted: bool
    claim: bool = True
    disturbance: dict[str, Any] | None = None
    search: SearchReport | None = None
    nodes_kept: list[str] = []
    sensitivity: list[dict[str, Any]] = []
    shapes: list[ShapeReport] = []
    by_batch: ByBatch | None = None
    chain: ChainReport | None = None
    profile: dict[str, Any] | None = None
    traffic: TrafficReport | None = None
    not_explained: dict[str, str] = {}
    compatibility: list[dict[str, Any]] = []
    bundles: dict[str, dict[str, Any]] = {}
