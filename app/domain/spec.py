"""`OptimizationSpec`: what the user wants. It speaks of intent, never of stages."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from app.domain.limits import INT64_MAX
from app.domain.strict import Dimension, Name, Strict
from app.domain.traffic import Traffic

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
Objective = Literal["latency", "throughput", "cost"]
Device = Literal["auto", "cpu", "cuda"]
CalibrationMethod = Literal["auto", "minmax", "entropy", "percentile", "mse"]
# fmt: off
Metric = Literal[
    "auto",
    "top1", "top5", "macro_f1", "mean_iou",  # against labels
    "mae", "rmse", "r2",  # against targets: float labels, or references named by the output
    "agreement", "kl", "cosine", "spearman", "neighbours", "normalized_error", "psnr",  # against the original
]
# fmt: on
MOST_TARGETS = 8
Int64 = Annotated[int, Field(ge=-INT64_MAX - 1, le=INT64_MAX)]
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class Target(Strict):
    """Where the engine shall run. `hardware` names one of the hardware ids in `GET /v1/capabilities`;
    `compute_capability` any NVIDIA GPU of it ("8.9"), whichever worker has one."""

    device: Device = "auto"
    hardware: Name | None = None
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = None
    backends: list[Name] | None = Field(default=None, min_length=1, max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _device_of_kind(cls, data: Any) -> Any:
        """Who names a compute capability asks for such a GPU."""
        if isinstance(data, dict) and data.get("compute_capability") is not None and data.get("device") == "auto":
            return {**data, "device": "cuda"}
        if isinstance(data, dict) and data.get("compute_capability") is not None:
            return {"device": "cuda", **data}
        return data

    @model_validator(mode="after")
    def _one_kind(self) -> Target:
        if self.compute_capability is not None and self.device == "cpu":
            raise ValueError("a compute capability is a GPU's, and the device asked for is cpu")
        return self


def _check_order(low: list[int], opt: list[int], high: list[int], length: str, place: str) -> None:
    if not len(low) == len(opt) == len(high):
        raise ValueError(f"min, opt and max must have the same {length}")
    for i, (a, b, c) in enumerate(zip(low, opt, high, strict=True)):
        if not a <= b <= c:
            raise ValueError(f"{place} {i} needs min ≤ opt ≤ max, got {a}, {b}, {c}")


class ShapeRange(Strict):
    """Smallest, most usual and largest shape of one input; the first axis is the batch."""

    min: list[Dimension] = Field(min_length=1, max_length=16)
    opt: list[Dimension] = Field(min_length=1, max_length=16)
    max: list[Dimension] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _ordered(self) -> ShapeRange:
        _check_order(self.min, self.opt, self.max, "rank", "axis")
        return self


class InputOptions(Strict):
    """`batch_axis`: the axis of an input along which the samples of a batch lie, where that is not the first one (1 for
    a recurrent state [layers, batch, size]); null for an input without a batch (an edge list, a set, a parameter)."""

    batch_axis: Annotated[int, Field(ge=0, le=63)] | None


class Calibration(Strict):
    dataset_id: str
    method: CalibrationMethod = "auto"
    max_samples: int = Field(default=512, ge=1, le=100_000)


class Validation(Strict):
    """`max_accuracy_loss_percent` is the largest loss of the metric that the user agrees to: percentage points of a
    score, percent of an error; for each metric as docs/measurement.md defines it. `confidence`: of the bound that
    proves it. `strict`: an engine whose loss is within the limit on the samples there are, but not proven by them, does
    not ship."""

    dataset_id: str | None = None
    metric: Metric = "auto"
    max_accuracy_loss_percent: float = Field(default=1.0, ge=0, le=100)
    max_samples: int = Field(default=2048, ge=1, le=1_000_000)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    strict: bool = False


class Constraints(Strict):
    p99_latency_ms: float | None = Field(default=None, gt=0)
    min_throughput_qps: float | None = Field(default=None, gt=0)
    max_memory_mb: float | None = Field(default=None, gt=0)
    max_size_mb: float | None = Field(default=None, gt=0)


class Benchmark(Strict):
    """`min_seconds` is measured per engine and batch size, spread over the interleaved rounds. `allow_noisy`: where the
    machine was too busy to claim a speed-up, let the engine ship that looked the fastest, marked as unproven; else the
    original ships."""

    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        default=[1, 8], min_length=1, max_length=16, json_schema_extra={"uniqueItems": True}
    )
    min_seconds: float = Field(default=3.0, ge=0.1, le=600)
    allow_noisy: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> Benchmark:
        if len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError("batch_sizes must be distinct")
        return self


class Cost(Strict):
    """What the machine costs. Without it, the objective `cost` counts with 1.0 per hour, and its figures are relative:
    good to compare configurations by, not to pay by."""

    price_per_hour: float = Field(gt=0, le=1e6)
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"


class PricedTarget(Cost):
    """A machine that is compared with others. `hardware`: a hardware id in `GET /v1/capabilities`; or a kind (`cpu`,
    `cuda`, a GPU's compute capability), where the live machines of that kind all have one id."""

    hardware: Name


class Search(Strict):
    """How configurations are tried. `halving`: a short timing and a small accuracy check for all, the full method for
    those that can still win. `exhaustive`: the full method for every configuration; takes several times as long."""

    strategy: Literal["halving", "exhaustive"] = "halving"


class Quantization(Strict):
    """`keep_nodes`: nodes that stay in higher precision, by their names in the simplified graph (an earlier report's
    `nodes_kept`). `win_back`: where int8 loses more accuracy than allowed, look for the nodes that cost it."""

    keep_nodes: list[Name] = Field(default=[], max_length=1000)
    win_back: bool = True


class ValueRange(Strict):
    """Smallest, most usual and largest values of an input that sets the shapes of other tensors."""

    min: list[Int64] = Field(min_length=1, max_length=64)
    opt: list[Int64] = Field(min_length=1, max_length=64)
    max: list[Int64] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _ordered(self) -> ValueRange:
        _check_order(self.min, self.opt, self.max, "length", "value")
        return self


class TensorRtBuild(Strict):
    """TensorRT's own settings. `workspace_mb`: most scratch memory of a tactic (None: all of the GPU's).
    `avg_timing_iterations`: TensorRT's default is 1; more make a choice of tactics less random. `exact_timing`: fail
    where the timing cache does not hold every layer."""

    workspace_mb: int | None = Field(default=None, ge=1, le=1 << 20)
    optimization_level: int = Field(default=3, ge=0, le=5)
    max_tactics: int | None = Field(default=None, ge=1, le=10_000)
    avg_timing_iterations: int = Field(default=8, ge=1, le=64)
    max_aux_streams: int | None = Field(default=None, ge=0, le=16)
    sparsity: bool = False
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    timing_cache: bool = True
    exact_timing: bool = False


class TensorRt(TensorRtBuild):
    """How TensorRT builds a job's engines; docs/gpu.md. `profiles`: several ranges of shapes instead of the job's
    `shapes`, one optimization profile each. `shape_values`: of inputs that set the shapes of other tensors."""

    profiles: list[dict[Name, ShapeRange]] | None = Field(default=None, min_length=1, max_length=8)
    shape_values: dict[Name, ValueRange] | None = None


def _possible(url: str) -> str:
    """`url`, if a request could be made of it; `ValueError` otherwise."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ValueError(f"is no URL: {error}") from None
    if port is not None and not 0 < port < 65536:
        raise ValueError("names an impossible port")
    if "[" in parts.netloc:
        if "%" in host:
            raise ValueError("names an address of one machine's network card")
        return url
    try:
        name = host.encode("idna").decode()
    except UnicodeError:
        name = ""
    if not _HOST.fullmatch(name) or len(name) > 253:
        raise ValueError("names no possible host: labels of 1 to 63 letters, digits and hyphens")
    if not url.partition(parts.netloc)[2].isascii():
        raise ValueError("has characters outside ASCII in its path: percent-encode them")
    return url


class Webhook(Strict):
    url: Annotated[
        str, StringConstraints(pattern=r"^https?://[^\s\x00-\x20\x7f]+$", max_length=2048), AfterValidator(_possible)
    ]


class OptimizationSpec(Strict):
    """`measure`: "again" takes no timing from an earlier job; graphs and builds that are known still are. `traffic`:
    what the engine is to serve; it is then measured under it, and its serving tuned for it. `targets`: machines that
    are each to have a job of their own; this one compares what the traffic costs on them.

    `engines_per_bundle`: with 2, the bundle may hold two engines, one for small and one for large batches, where that
    gains at one of `benchmark.batch_sizes`; both are loaded, so that it takes the memory of both. By default 2 where
    latency is the objective, which promises something at every batch size, and 1 for throughput and cost, where memory
    is better spent on further instances."""

    model_id: str
    objective: Objective = "latency"
    target: Target = Target()
    targets: list[PricedTarget] | None = Field(default=None, min_length=1, max_length=MOST_TARGETS)
    precisions: list[Precision] | None = Field(default=None, min_length=1)
    shapes: dict[Name, ShapeRange] | None = None
    inputs: dict[Name, InputOptions] | None = None
    calibration: Calibration | None = None
    validation: Validation = Validation()
    constraints: Constraints = Constraints()
    benchmark: Benchmark = Benchmark()
    cost: Cost | None = None
    traffic: Traffic | None = None
    search: Search = Search()
    quantization: Quantization = Quantization()
    tensorrt: TensorRt = TensorRt()
    measure: Literal["cached", "again"] = "cached"
    engines_per_bundle: Annotated[int, Field(ge=1, le=2)] | None = None
    budget_seconds: int = Field(default=900, ge=10, le=86_400)
    webhook: Webhook | None = None

    @property
    def most_engines(self) -> int:
        """That one bundle may hold."""
        return self.engines_per_bundle or (2 if self.objective == "latency" else 1)

    @field_validator("targets")
    @classmethod
    def _comparable(cls, targets: list[PricedTarget] | None) -> list[PricedTarget] | None:
        names = [target.hardware for target in targets or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"names {twice!r} twice: give one price for it")
        currencies = sorted({target.currency for target in targets or ()})
        if len(currencies) > 1:
            raise ValueError(f"has prices in {' and '.join(currencies)}: give them all in one currency")
        return targets

    @model_validator(mode="after")
    def _targets_alone(self) -> OptimizationSpec:
        if self.targets is None:
            return self
        if self.traffic is None:
            raise ValueError(
                "targets are compared by what it costs to serve a job's traffic: give traffic, with its slo"
            )
        if self.cost is not None:
            raise ValueError("give either cost or targets, not both: each target has its own price")
        if self.target.hardware is not None or self.target.compute_capability is not None:
            raise ValueError("give either one target's hardware or targets, not both")
        return self

    @model_validator(mode="after")
    def _shapes_once(self) -> OptimizationSpec:
        if self.shapes and self.tensorrt.profiles:
            raise ValueError("give either shapes or tensorrt.profiles, not both")
        return self
