"""`OptimizationSpec`: what the user wants. It speaks of intent, never of stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from app.domain.chain import Chain, Link
from app.domain.shapes import ShapeRange, TensorRt
from app.domain.strict import Name, Strict
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
# Fields of a spec that name data sets; the one that judges last.
DATASETS = (
    ("quantization", "training", "dataset_id"),
    ("calibration", "dataset_id"),
    ("validation", "dataset_id"),
)
OF_THE_QUEUE = ("priority", "max_queue_seconds")  # kept in columns of the job, beside its spec
# What the release before does not know: its workers refuse a spec that has it.
NEW = (("quantization", "training"), ("chain",))
_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


class Target(Strict):
    """Where the engine shall run. `hardware` names one of the hardware ids in `GET /v1/capabilities`;
    `compute_capability` any NVIDIA GPU of it ("8.9"), whichever worker has one."""

    device: Device = "auto"
    """The kind of device; `auto`: whatever live workers offer, a GPU first."""
    hardware: Name | None = None
    """A hardware id of `GET /v1/capabilities`: the engine is built and measured on that kind of machine."""
    compute_capability: Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]?\.[0-9]$")] | None = None
    """Any NVIDIA GPU of this compute capability, as "8.9"."""
    backends: list[Name] | None = Field(default=None, min_length=1, max_length=16)
    """Inference libraries that may be used, of those that live workers report; null: all of them."""

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


class InputOptions(Strict):
    """`batch_axis`: the axis of an input along which the samples of a batch lie, where that is not the first one (1 for
    a recurrent state [layers, batch, size]); null for an input without a batch (an edge list, a set, a parameter)."""

    batch_axis: Annotated[int, Field(ge=0, le=63)] | None
    """The axis along which a batch's samples lie; null for an input without a batch."""


class Calibration(Strict):
    dataset_id: str
    """The data set whose samples int8 ranges are found with."""
    method: CalibrationMethod = "auto"
    """How ranges are found; `auto` tries what suits the model."""
    max_samples: int = Field(default=512, ge=1, le=100_000)
    """At most so many samples calibrate."""


class Validation(Strict):
    """`max_accuracy_loss_percent` is the largest loss of the metric that the user agrees to: percentage points of a
    score, percent of an error; for each metric as docs/measurement.md defines it. `confidence`: of the bound that
    proves it. `strict`: an engine whose loss is within the limit on the samples there are, but not proven by them, does
    not ship."""

    dataset_id: str | None = None
    """The data set that accuracy is judged on; null: the part of the calibration data that does not calibrate."""
    metric: Metric = "auto"
    """How accuracy is judged; `auto`: by what the data hold (labels, references, else agreement with the original)."""
    max_accuracy_loss_percent: float = Field(default=1.0, ge=0, le=100)
    """The largest loss of the metric that is agreed to."""
    max_samples: int = Field(default=2048, ge=1, le=1_000_000)
    """At most so many samples judge."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the bound that proves the loss."""
    strict: bool = False
    """Whether an engine whose loss keeps the limit but is not proven to is refused."""


class Constraints(Strict):
    p99_latency_ms: float | None = Field(default=None, gt=0)
    """99 of 100 calls take at most so many milliseconds, at the batch size of the objective."""
    min_throughput_qps: float | None = Field(default=None, gt=0)
    """At least so many samples per second."""
    max_memory_mb: float | None = Field(default=None, gt=0)
    """At most so much memory: of the GPU for engines that run on one, else of the process."""
    max_size_mb: float | None = Field(default=None, gt=0)
    """At most so large an engine file."""


class Benchmark(Strict):
    """`min_seconds` is measured per engine and batch size, spread over the interleaved rounds. `allow_noisy`: where the
    machine was too busy to claim a speed-up, let the engine ship that looked the fastest, marked as unproven; else the
    original ships."""

    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        default=[1, 8], min_length=1, max_length=16, json_schema_extra={"uniqueItems": True}
    )
    """The batch sizes that engines are measured at."""
    min_seconds: float = Field(default=3.0, ge=0.1, le=600)
    """Measured time per engine and batch size."""
    allow_noisy: bool = False
    """Whether an engine may ship unproven where the machine was too busy to claim a speed-up."""

    @model_validator(mode="after")
    def _distinct(self) -> Benchmark:
        if len(set(self.batch_sizes)) != len(self.batch_sizes):
            raise ValueError("batch_sizes must be distinct")
        return self


class Cost(Strict):
    """What the machine costs. Without it, the objective `cost` counts with 1.0 per hour, and its figures are relative:
    good to compare configurations by, not to pay by."""

    price_per_hour: float = Field(gt=0, le=1e6)
    """Of one machine."""
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"
    """Three capital letters (ISO 4217)."""


class PricedTarget(Cost):
    """A machine that is compared with others. `hardware`: a hardware id in `GET /v1/capabilities`; or a kind (`cpu`,
    `cuda`, a GPU's compute capability), where the live machines of that kind all have one id."""

    hardware: Name
    """A hardware id, or a kind: `cpu`, `cuda`, a compute capability."""


class Search(Strict):
    """How configurations are tried. `halving`: a short timing and a small accuracy check for all, the full method for
    those that can still win. `exhaustive`: the full method for every configuration; takes several times as long."""

    strategy: Literal["halving", "exhaustive"] = "halving"
    """`halving`: short tries first; `exhaustive`: the full method for everything."""


class Training(Strict):
    """Of weights that learn to be rounded to int8 (docs/training.md), for models uploaded as `.pt2`. The teacher is the
    model itself: labels are not needed, and used where the data has class numbers."""

    mode: Literal["off", "auto", "always"] = "off"
    """`auto`: where no other way keeps the limit on accuracy, and the budget holds it; `always`: for every static int8
    configuration beside the one without; `off`: never."""
    dataset_id: str | None = None
    """The data set to train on; null: what calibrates. Samples that judge never train."""
    epochs: int = Field(default=20, ge=1, le=1000)
    """Passes over the data, at most: it ends where it gets no better."""
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    """Of Adam, at its highest: a third of it where the loss rises."""
    max_seconds: int = Field(default=300, ge=5, le=36_000)
    """That training may take."""


class Quantization(Strict):
    """`keep_nodes`: nodes that stay in higher precision, by their names in the simplified graph (an earlier report's
    `nodes_kept`). `win_back`: where int8 loses more accuracy than allowed, look for the nodes that cost it. `training`:
    on which terms weights are trained."""

    keep_nodes: list[Name] = Field(default=[], max_length=1000)
    """Nodes that stay in higher precision, by their names in the simplified graph."""
    win_back: bool = True
    """Whether nodes that cost too much accuracy are looked for and kept."""
    training: Training = Training()
    """Whether and how weights learn to be rounded."""


_URL = r"^https?://[^\s\x00-\x20\x7f]+$"


def _possible(url: str) -> str:
    """`url`, if a request could be made of it; `ValueError` otherwise."""
    if not re.fullmatch(_URL, url) or url.endswith("\n"):
        raise ValueError("must begin with https:// or http:// and hold no blanks, as https://ml.example.com/anneal")
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


# The pattern stands in the document; what it refuses is told in words.
WebhookUrl = Annotated[
    str, StringConstraints(max_length=2048), AfterValidator(_possible), Field(json_schema_extra={"pattern": _URL})
]


class Webhook(Strict):
    url: WebhookUrl
    """Told by a POST once the job has ended, until it answers 2xx."""


class OptimizationSpec(Strict):
    """`measure`: "again" takes no timing from an earlier job; graphs and builds that are known still are. `traffic`:
    what the engine is to serve; it is then measured under it, and its serving tuned for it. `targets`: machines that
    are each to have a job of their own; this one compares what the traffic costs on them.

    `engines_per_bundle`: with 2, the bundle may hold two engines, one for small and one for large batches, where that
    gains at one of `benchmark.batch_sizes`; both are loaded, so that it takes the memory of both. By default 2 where
    latency is the objective, which promises something at every batch size, and 1 for throughput and cost, where memory
    is better spent on further instances.

    `priority` and `max_queue_seconds` are about the queue, not about the engine: they change nothing of what is found,
    nor what an earlier job's results are good for."""

    model_id: str
    """The uploaded model; with `chain`, the first of its models."""
    chain: Chain | None = None
    """Further models that the outputs go to: all of them are optimized as one."""
    objective: Objective = "latency"
    """What is to be best: latency at the first batch size; throughput or cost at the largest."""
    target: Target = Target()
    """Where the engine shall run."""
    targets: list[PricedTarget] | None = Field(default=None, min_length=1, max_length=MOST_TARGETS)
    """Machines with prices that are compared; needs `traffic`."""
    precisions: list[Precision] | None = Field(default=None, min_length=1)
    """Precisions that may be tried; null lets the service search."""
    shapes: dict[Name, ShapeRange] | None = None
    """The range of each dynamic input's shape, by input."""
    inputs: dict[Name, InputOptions] | None = None
    """Which axis is the batch, by input, where it is not the first."""
    calibration: Calibration | None = None
    """Data that int8 needs; without it int8 is tried only where it needs none."""
    validation: Validation = Validation()
    """How much accuracy may be lost, and what judges it."""
    constraints: Constraints = Constraints()
    """Limits that the engine must keep, or the job fails and says what came nearest."""
    benchmark: Benchmark = Benchmark()
    """What is measured, and for how long."""
    cost: Cost | None = None
    """What the machine costs."""
    traffic: Traffic | None = None
    """What the engine is to serve: it is measured and its serving tuned under it."""
    search: Search = Search()
    """How configurations are tried."""
    quantization: Quantization = Quantization()
    """How int8 is made."""
    tensorrt: TensorRt = TensorRt()
    """How TensorRT builds."""
    measure: Literal["cached", "again"] = "cached"
    """`again`: no timing is taken from an earlier job."""
    engines_per_bundle: Annotated[int, Field(ge=1, le=2)] | None = None
    """2: the bundle may hold one engine for small and one for large batches."""
    budget_seconds: int = Field(default=900, ge=10, le=86_400)
    """After which the best engine so far ships."""
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    """Above 0: before your other jobs. Below: after everybody's."""
    max_queue_seconds: Annotated[int, Field(ge=1, le=30 * 86_400)] | None = None
    """The job fails where no worker has taken it by then."""
    webhook: Webhook | None = None
    """Who is told of the job's end."""

    @property
    def links(self) -> list[Link]:
        """The models behind the first one, where it is a chain."""
        return [] if self.chain is None else self.chain.then

    @property
    def most_engines(self) -> int:
        """That one bundle may hold, beside those of a chain."""
        if self.chain is not None and self.chain.apart:
            return 1
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
    def _one_engine_each(self) -> OptimizationSpec:
        if self.chain is None or not self.chain.apart:
            return self
        if self.engines_per_bundle == 2:
            raise ValueError("an ensemble has one engine of each model: leave engines_per_bundle out, or deploy merged")
        if self.tensorrt.profiles:
            raise ValueError("tensorrt.profiles are of one engine, and an ensemble has several: give shapes instead")
        return self

    @model_validator(mode="after")
    def _shapes_once(self) -> OptimizationSpec:
        if self.shapes and self.tensorrt.profiles:
            raise ValueError("give either shapes or tensorrt.profiles, not both")
        return self


def stored(spec: OptimizationSpec) -> dict[str, Any]:
    """As it stands with its job: without what is kept beside it, and without what is new and left at its default, so
    that workers of the release before take the job (docs/upgrades.md)."""
    document = spec.model_dump(mode="json", exclude=set(OF_THE_QUEUE))
    usual = OptimizationSpec(model_id=spec.model_id).model_dump(mode="json")
    for *path, name in NEW:
        section, default = document, usual
        for step in path:
            section, default = section[step], default[step]
        if section[name] == default[name]:
            del section[name]
    return document


def datasets_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """The data sets that a job with this spec (as JSON) uses, by the JSON pointer of the field that names each."""
    found: dict[str, str] = {}
    for path in DATASETS:
        value: Any = spec
        for name in path:
            value = (value or {}).get(name)
        if value is not None:
            found["/" + "/".join(path)] = value
    return found
