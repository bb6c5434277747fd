"""What the service is sent. Made from openapi.json by `clients/python/generate.py`: do not edit."""

from __future__ import annotations

from typing import Literal, Required, TypedDict


class Benchmark(TypedDict, total=False):
    """`min_seconds` is measured per engine and batch size, spread over the interleaved rounds. `allow_noisy`: where the
    machine was too busy to claim a speed-up, let the engine ship that looked the fastest, marked as unproven; else the
    original ships."""

    allow_noisy: bool
    batch_sizes: list[int]  # The batch sizes that engines are measured at.
    min_seconds: float  # Measured time per engine and batch size.


class Calibration(TypedDict, total=False):
    dataset_id: Required[str]  # The data set whose samples int8 ranges are found with.
    max_samples: int  # At most so many samples calibrate.
    method: Literal[
        "auto", "minmax", "entropy", "percentile", "mse"
    ]  # How ranges are found; `auto` tries what suits the model.


class Chain(TypedDict, total=False):
    """The models behind `model_id`, which is the first of them. `deploy`: `merged` makes one engine of the whole;
    `ensemble` one of each model, which the bundle for Triton holds as an ensemble: each can be given instances, and be
    asked, by itself. Either way the whole is what is judged and measured."""

    deploy: Literal["merged", "ensemble"]  # `merged`: one engine of the whole; `ensemble`: an engine of each model.
    then: Required[list[Link]]  # The models that follow, in order.


class Constraints(TypedDict, total=False):
    max_memory_mb: float | None
    max_size_mb: float | None  # At most so large an engine file.
    min_throughput_qps: float | None  # At least so many samples per second.
    p99_latency_ms: float | None


class Cost(TypedDict, total=False):
    """What the machine costs. Without it, the objective `cost` counts with 1.0 per hour, and its figures are relative:
    good to compare configurations by, not to pay by."""

    currency: str  # Three capital letters (ISO 4217).
    price_per_hour: Required[float]  # Of one machine.


class InputOptions(TypedDict, total=False):
    """`batch_axis`: the axis of an input along which the samples of a batch lie, where that is not the first one (1 for
    a recurrent state [layers, batch, size]); null for an input without a batch (an edge list, a set, a parameter)."""

    batch_axis: Required[int | None]


class Link(TypedDict, total=False):
    """A model that the outputs of the one before it go to. `connect`: its input → the output that goes there; null: by
    equal names, or the only output to the only input. Inputs that nothing goes to are inputs of the whole; one of the
    same name is one input of both."""

    connect: dict[str, str] | None
    model_id: Required[str]  # The uploaded model.


class OptimizationSpec(TypedDict, total=False):
    """`measure`: "again" takes no timing from an earlier job; graphs and builds that are known still are. `traffic`:
    what the engine is to serve; it is then measured under it, and its serving tuned for it. `targets`: machines that
    are each to have a job of their own; this one compares what the traffic costs on them.

    `engines_per_bundle`: with 2, the bundle may hold two engines, one for small and one for large batches, where that
    gains at one of `benchmark.batch_sizes`; both are loaded, so that it takes the memory of both. By default 2 where
    latency is the objective, which promises something at every batch size, and 1 for throughput and cost, where memory
    is better spent on further instances.

    `priority` and `max_queue_seconds` are about the queue, not about the engine: they change nothing of what is found,
    nor what an earlier job's results are good for."""

    benchmark: Benchmark  # What is measured, and for how long.
    budget_seconds: int  # After which the best engine so far ships.
    calibration: Calibration | None  # Data that int8 needs; without it int8 is tried only where it needs none.
    chain: Chain | None  # Further models that the outputs go to: all of them are optimized as one.
    constraints: Constraints
    cost: Cost | None  # What the machine costs.
    engines_per_bundle: int | None  # 2: the bundle may hold one engine for small and one for large batches.
    inputs: dict[str, InputOptions] | None  # Which axis is the batch, by input, where it is not the first.
    max_queue_seconds: int | None  # The job fails where no worker has taken it by then.
    measure: Literal["cached", "again"]  # `again`: no timing is taken from an earlier job.
    model_id: str  # The uploaded model; with `chain`, the first of its models.
    objective: Literal["latency", "throughput", "cost"]
    precisions: (
        list[Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]] | None
    )  # Precisions that may be tried; null lets the service search.
    priority: int  # Above 0: before your other jobs. Below: after everybody's.
    quantization: Quantization  # How int8 is made.
    search: Search  # How configurations are tried.
    shapes: dict[str, ShapeRange] | None  # The range of each dynamic input's shape, by input.
    target: Target  # Where the engine shall run.
    targets: list[PricedTarget] | None  # Machines with prices that are compared; needs `traffic`.
    tensorrt: TensorRt  # How TensorRT builds.
    traffic: Traffic | None
    validation: Validation  # How much accuracy may be lost, and what judges it.
    webhook: Webhook | None  # Who is told of the job's end.


class PricedTarget(TypedDict, total=False):
    """A machine that is compared with others. `hardware`: a hardware id in `GET /v1/capabilities`; or a kind (`cpu`,
    `cuda`, a GPU's compute capability), where the live machines of that kind all have one id."""

    currency: str  # Three capital letters (ISO 4217).
    hardware: Required[str]  # A hardware id, or a kind: `cpu`, `cuda`, a compute capability.
    price_per_hour: Required[float]  # Of one machine.


class Quantization(TypedDict, total=False):
    """`keep_nodes`: nodes that stay in higher precision, by their names in the simplified graph (an earlier report's
    `nodes_kept`). `win_back`: where int8 loses more accuracy than allowed, look for the nodes that cost it. `training`:
    on which terms weights are trained."""

    keep_nodes: list[str]
    training: Training  # Whether and how weights learn to be rounded.
    win_back: bool  # Whether nodes that cost too much accuracy are looked for and kept.


class Search(TypedDict, total=False):
    """How configurations are tried. `halving`: a short timing and a small accuracy check for all, the full method for
    those that can still win. `exhaustive`: the full method for every configuration; takes several times as long."""

    strategy: Literal["halving", "exhaustive"]


class ShapeRange(TypedDict, total=False):
    """Smallest, most usual and largest shape of one input; the first axis is the batch."""

    max: Required[list[int]]  # The largest one.
    min: Required[list[int]]  # The smallest size of each axis.
    opt: Required[list[int]]  # The most usual one, which engines are tuned for.


class ShapeShare(TypedDict, total=False):
    """`dims`: the shape of every input, its batch axis included (any size stands there: `batch_mix` says it)."""

    dims: Required[dict[str, list[int]]]  # The shape of every input, its batch axis included.
    share: Required[float]  # Of all requests.


class Slo(TypedDict, total=False):
    """The limit: 99 of 100 requests are answered within `p99_latency_ms`, counted from when they were due. Whatever was
    refused, failed or came too late is not answered within it. `timeout_ms`: after which a caller has left; ten times
    the limit where it is not said."""

    p99_latency_ms: Required[float]
    timeout_ms: float | None  # After which a caller has left; null: ten times the limit.


class Target(TypedDict, total=False):
    """Where the engine shall run. `hardware` names one of the hardware ids in `GET /v1/capabilities`;
    `compute_capability` any NVIDIA GPU of it ("8.9"), whichever worker has one."""

    backends: list[str] | None
    compute_capability: str | None  # Any NVIDIA GPU of this compute capability, as "8.9".
    device: Literal["auto", "cpu", "cuda"]  # The kind of device; `auto`: whatever live workers offer, a GPU first.
    hardware: str | None


class TensorRt(TypedDict, total=False):
    """How TensorRT builds a job's engines; docs/gpu.md. `profiles`: several ranges of shapes instead of the job's
    `shapes`, one optimization profile each. `shape_values`: of inputs that set the shapes of other tensors."""

    avg_timing_iterations: int  # Runs that a tactic's time is the mean of.
    exact_timing: bool  # Whether to fail where the timing cache does not hold every layer.
    hardware_compatibility: Literal[
        "none", "ampere_plus", "same_compute_capability"
    ]  # The GPUs that the engine loads on beside the one it was built on.
    max_aux_streams: int | None  # At most so many streams beside the main one.
    max_tactics: int | None  # At most so many tactics are timed for a layer.
    optimization_level: int  # 0 builds fastest, 5 looks the longest.
    profiles: list[dict[str, ShapeRange]] | None
    shape_values: dict[str, ValueRange] | None  # Values of inputs that set the shapes of other tensors, by input.
    sparsity: bool  # Whether weights that are 2:4 sparse may be used so.
    timing_cache: bool  # Whether the times of tactics are kept and used again.
    version_compatible: bool  # Whether later versions of TensorRT may load the engine.
    workspace_mb: int | None  # Most scratch memory of a tactic; null: all of the GPU's.


class Traffic(TypedDict, total=False):
    """`rate_per_second`: of requests, that are to be served; where it is not said, only the highest rate within the
    limit is looked for. `trace`: arrival times in seconds, in order; other rates are the same trace, faster or slower.
    `trace_gaps`: what to make of a pause that no such traffic has by chance: `refuse` the trace, `keep` it (there were
    no requests), or `close` it (the recording was interrupted). `batch_mix`: batch size → share of the requests.
    `shape_mix`: shares of shapes; without it, those of the data set."""

    arrival: Literal[
        "poisson", "constant", "trace"
    ]  # When requests come: at random (`poisson`), evenly, or as the trace says.
    batch_mix: dict[str, float]  # Batch size → share of the requests.
    rate_per_second: float | None
    shape_mix: list[ShapeShare] | None  # Shares of shapes; null: those of the data set.
    slo: Required[Slo]  # The limit that is to be kept.
    trace: list[float] | None  # Arrival times in seconds, in order.
    trace_gaps: Literal["refuse", "keep", "close"]  # What to make of pauses that no such traffic has by chance.


class Training(TypedDict, total=False):
    """Of weights that learn to be rounded to int8 (docs/training.md), for models uploaded as `.pt2`. The teacher is the
    model itself: labels are not needed, and used where the data has class numbers."""

    dataset_id: str | None
    epochs: int  # Passes over the data, at most: it ends where it gets no better.
    learning_rate: float  # Of Adam, at its highest: a third of it where the loss rises.
    max_seconds: int  # That training may take.
    mode: Literal["off", "auto", "always"]


class UploadIn(TypedDict, total=False):
    filename: Required[str]
    sha256: str | None  # Verified when the upload is completed
    size_bytes: Required[int]


class Validation(TypedDict, total=False):
    """`max_accuracy_loss_percent` is the largest loss of the metric that the user agrees to: percentage points of a
    score, percent of an error; for each metric as docs/measurement.md defines it. `confidence`: of the bound that
    proves it. `strict`: an engine whose loss is within the limit on the samples there are, but not proven by them, does
    not ship."""

    confidence: float  # Of the bound that proves the loss.
    dataset_id: str | None
    max_accuracy_loss_percent: float  # The largest loss of the metric that is agreed to.
    max_samples: int  # At most so many samples judge.
    metric: Literal[
        "auto",
        "top1",
        "top5",
        "macro_f1",
        "mean_iou",
        "mae",
        "rmse",
        "r2",
        "agreement",
        "kl",
        "cosine",
        "spearman",
        "neighbours",
        "normalized_error",
        "psnr",
    ]
    strict: bool


class ValueRange(TypedDict, total=False):
    """Smallest, most usual and largest values of an input that sets the shapes of other tensors."""

    max: Required[list[int]]  # The largest ones.
    min: Required[list[int]]  # The smallest values.
    opt: Required[list[int]]  # The most usual ones.


class Webhook(TypedDict, total=False):
    url: Required[str]  # Told by a POST once the job has ended, until it answers 2xx.
