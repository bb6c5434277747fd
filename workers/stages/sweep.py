"""Stage `sweep`: one engine over batch sizes and instances × threads, latency against throughput."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from app.domain.failures import FailureKind, StageFailure
from workers import hardware
from workers.kernel import Stage, StageContext, StageOptions, StageResult, backends
from workers.measure import winner
from workers.measure.axes import fixed_batch
from workers.measure.deployment import choose
from workers.measure.device_memory import DeviceMemory
from workers.measure.engine_child import Feeds
from workers.measure.engine_process import EngineProcess
from workers.measure.figures import distribution, rounded
from workers.measure.inputs import InputSource
from workers.measure.instances import Driven, Instances, Layout, default_layouts, usable_cores
from workers.measure.method import sweep_method, versions
from workers.measure.plan import P99_CAP_S
from workers.measure.stats import P50_SAMPLES, P99_SAMPLES
from workers.measure.winner import WINDOWS
from workers.members import names_of

_WARM_UP_CAP_S = 0.5
_WARM_UP_ITERATIONS = 20
_LEAST_WINDOW_S = 0.1
_P50_CAP_S = 10.0  # of a window that is made longer for the samples of a median
_EACH_S = 0.6  # around the window: starting, binding, warming up
_SLOW_NS = 0.5e9  # a call above which a larger batch has to promise something
_GAIN = 1.03
_RETAKE_SHARE = 1.5  # of what the windows to come take: with more time left one that had company is taken again
_NO_TIME = "the time ran out before it"


class SweepOptions(StageOptions):
    """`layouts`: None takes all that share this machine's cores evenly. `min_seconds`: measured per configuration, over
    all `passes`. `p99_limit_ms`: where one is asked for, the samples that carry a p99 are gone for, and batch sizes
    beyond one that misses it are not measured. `objective` decides what is measured first, and with the other limits
    and `batch` (`measure.deployment.choose`) who wins: that one is measured again."""

    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(
        default=[1, 2, 4, 8, 16, 32], min_length=1, max_length=16
    )
    layouts: list[Layout] | None = Field(default=None, min_length=1, max_length=32)
    min_seconds: float = Field(default=1.0, gt=0, le=600)
    passes: int = Field(default=2, ge=1, le=10)
    p99_limit_ms: float | None = Field(default=None, gt=0)
    min_throughput_qps: float | None = Field(default=None, gt=0)
    max_memory_mb: float | None = Field(default=None, gt=0)
    batch: int | None = Field(default=None, ge=1)
    objective: Literal["latency", "throughput", "cost"] = "latency"
    shapes: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("layouts")
    @classmethod
    def _distinct(cls, layouts: list[Layout] | None) -> list[Layout] | None:
        if layouts is not None and len(set(map(str, layouts))) != len(layouts):
            raise ValueError("layouts must be distinct")
        return layouts


@dataclass
class _Configuration:
    """What is known of one layout at one batch size. `dropped`: why it was not measured."""

    layout: Layout
    batch: int
    runtime: dict[str, Any]
    runs: list[Driven] = field(default_factory=list)
    p50_ns: float = 0.0
    memory_mb: float | None = None
    gpu_memory_mb: float | None = None
    not_finite: list[str] = field(default_factory=list)
    p99_refused: str | None = None
    failed: StageFailure | None = None
    dropped: str | None = None
    again: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.layout.instances}x{self.layout.threads}@{self.batch}"

    @property
    def open(self) -> bool:
        return self.failed is None and self.dropped is None

    @property
    def qps(self) -> float:
        return self.batch * sum(r.calls_per_s for r in self.runs) / len(self.runs)

    def latencies(self) -> np.ndarray[Any, Any]:
        return np.concatenate([r.latencies for r in self.runs])

    def to_json(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "id": self.id,
            "batch": self.batch,
            "instances": self.layout.instances,
            "threads": self.layout.threads,
            "runtime": self.runtime,
            "passes": len(self.runs),
            "memory_mb": rounded(self.memory_mb),
            "gpu_memory_mb": rounded(self.gpu_memory_mb),
        }
        if self.failed is not None:
            return {**facts, "status": "failed", "reason": self.failed.detail, "failed": self.failed.to_json()}
        if not self.runs:
            return {**facts, "status": "not_measured", "reason": self.dropped or _NO_TIME}
        return {
            **facts,
            "status": "measured",
            "reason": None,
            **distribution(self.latencies(), self.p99_refused),
            "throughput_qps": rounded(self.qps),
            "throughput_by_pass": [rounded(self.batch * r.calls_per_s) for r in self.runs],
            "p50_by_pass": [rounded(float(np.median(r.latencies)) / 1e6) for r in self.runs],
            "ms_per_sample": rounded(1e3 / self.qps),
            "not_finite": self.not_finite,
            "disturbed_passes": sum(r.disturbance.disturbed is not None for r in self.runs),
            "again": self.again,
        }


class Sweep(Stage[SweepOptions]):
    """inputs: engine, [data]. output: samples (raw latencies, `samples.npz`: `<id>|<pass>`).

    data: configurations [{id "<instances>x<threads>@<batch>", batch, instances, threads, runtime (what `load` takes),
    status "measured" | "failed" | "not_measured", reason, passes, samples, mean_ms, p50_ms … p999_ms, min_ms, max_ms,
    reasons, throughput_qps (samples per second of all instances together), throughput_by_pass, p50_by_pass,
    ms_per_sample (1000 / throughput), memory_mb, gpu_memory_mb, not_finite, disturbed_passes, again (of the winner by
    the options: see `measure.winner.again`), [failed]}], batch_sizes, skipped_batches
    {batch: why}, fixed_batch, layouts, cores, threads_matter, pinned, p99_limit_ms, complete, shortened, method,
    conditions, versions.

    A configuration that fails is written down as such; only an engine that does not load fails the stage.
    `complete` is False where the soft deadline left configurations or passes out; then, and where the windows were
    shortened for it, the result is not reusable.
    """

    name = "sweep"
    version = 5
    Options = SweepOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    hardware_bound = True
    exclusive_device = True
    weight: ClassVar[float] = 3.0

    def run(self, ctx: StageContext, options: SweepOptions) -> StageResult:
        known = backends()
        if options.backend not in known:
            detail = f"This worker has no backend {options.backend!r}."
            raise StageFailure("backend_unavailable", detail, FailureKind.REQUEST, self.name)
        for name in names_of(options.backend, options.runtime):
            known[name]().probe(ctx.hardware)  # imports the library once here, and not in every fork
        return _Run(ctx, options).result()


class _Run:
    """One sweep: the configurations fill up from pass to pass."""

    def __init__(self, ctx: StageContext, options: SweepOptions) -> None:
        self.ctx = ctx
        self.options = options
        self.folder = ctx.inputs["engine"]
        self.backend = backends()[options.backend]()
        self.cores = usable_cores(ctx.hardware.get("cpu_quota"))
        one, two = (self.backend.with_threads(options.runtime, n) for n in (1, 2))
        self.threads_matter = one != two
        self.layouts = self._layouts()
        self.skipped: dict[str, str] = {}
        self.complete = True
        self.pinned = self.threads_matter
        self.done = 0

    def result(self) -> StageResult:
        before = hardware.conditions(self.ctx.hardware)
        feeds, words, fixed = self._look()
        self.configurations = [
            _Configuration(layout, batch, self.backend.with_threads(self.options.runtime, layout.threads))
            for layout in self.layouts
            for batch in sorted(feeds)
        ]
        self.window_s = self._window_seconds()
        for number in range(self.options.passes):
            self._pass(number, feeds)
        self._winner(feeds)
        folder = self.ctx.output("samples")
        raw = {f"{c.id}|{i}": r.latencies for c in self.configurations for i, r in enumerate(c.runs)}
        np.savez_compressed(folder / "samples.npz", **raw)  # type: ignore[arg-type]  # numpy types **kwds as bool
        shortened = self.window_s < self.options.min_seconds / self.options.passes
        passing = any(c.failed is not None and not c.failed.cacheable for c in self.configurations)
        self.ctx.reporter.progress(1.0, "done")
        return StageResult(
            ("samples",),
            {
                "configurations": [c.to_json() for c in self.configurations],
                "batch_sizes": sorted(feeds),
                "skipped_batches": self.skipped,
                "fixed_batch": fixed,
                "layouts": [layout.model_dump() for layout in self.layouts],
                "cores": len(self.cores),
                "threads_matter": self.threads_matter,
                "pinned": self.pinned,
                "p99_limit_ms": self.options.p99_limit_ms,
                "complete": self.complete,
                "shortened": shortened,
                "method": sweep_method(
                    inputs=words, pinned=self.pinned, min_seconds=self.options.min_seconds, passes=self.options.passes
                ),
                "conditions": {"before": before, "after": hardware.conditions(self.ctx.hardware)},
                "versions": versions(names_of(self.options.backend, self.options.runtime)),
            },
            reusable=self.complete and not shortened and not passing,
        )

    def _layouts(self) -> list[Layout]:
        """Those asked for, else all that share the cores; for latency few instances first, else many."""
        if self.options.layouts is not None:
            return list(self.options.layouts)
        found = default_layouts(len(self.cores), threads_matter=self.threads_matter)
        return found if self.options.objective == "latency" else sorted(found, key=lambda x: -x.instances)

    def _look(self) -> tuple[Feeds, str, int | None]:
        """Load once to see what the engine takes."""
        process = EngineProcess(self.options.backend, self.options.backend, self.folder, self.options.runtime)
        try:
            loaded = process.load()
        except StageFailure as failure:
            failure.stage = Sweep.name
            raise
        finally:
            process.close()
        sizes = sorted(set(self.options.batch_sizes))
        fixed = fixed_batch(loaded.inputs)
        if fixed is not None:
            self.skipped = {str(b): f"the engine takes batches of {fixed} only" for b in sizes if b != fixed}
            sizes = [fixed]
        file = self.ctx.only_file("data") if "data" in self.ctx.inputs else None
        source = InputSource(file, loaded.inputs, loaded.outputs, self.options.shapes, self.options.seed)
        feeds, words = source.typical(sizes)
        return feeds, words, fixed

    def _window_seconds(self) -> float:
        """Of one configuration in one pass; shorter where the time left would not hold all of them."""
        each = self.ctx.seconds_left() / len(self.configurations) / self.options.passes
        wanted = self.options.min_seconds / self.options.passes
        return min(wanted, max(_LEAST_WINDOW_S, each - _EACH_S))

    def _pass(self, number: int, feeds: Feeds) -> None:
        """All layouts, one after the other: the first pass in the order of promise and with growing batches (what a
        smaller one shows decides on the larger, and memory grows with them), the others in an order drawn anew."""
        layouts = list(self.layouts)
        draw = random.Random(f"{self.options.seed}/{number}")  # noqa: S311  (an order of turns, no secret)
        if number:
            draw.shuffle(layouts)
        for layout in layouts:
            todo = [c for c in self.configurations if c.layout == layout and c.open]
            if number:
                draw.shuffle(todo)
            if todo and self._in_time(todo[0], number):
                self._layout(layout, todo, number, feeds)

    def _in_time(self, configuration: _Configuration, number: int) -> bool:
        """Whether the time left holds this configuration once more; else it is given up."""
        expected = _EACH_S + self.window_s + 4 * self._guess_ns(configuration) / 1e9
        if self.ctx.seconds_left() >= expected:
            return True
        self.complete = False
        if number == 0:
            configuration.dropped = _NO_TIME
        return False

    def _guess_ns(self, configuration: _Configuration) -> float:
        """What a call is expected to take, from the nearest that was measured: in proportion to the batch."""
        known = [c for c in self.configurations if c.p50_ns]
        if not known:
            return 0.0
        nearest = min(known, key=lambda c: (c.layout != configuration.layout, abs(c.batch - configuration.batch)))
        return nearest.p50_ns * configuration.batch / nearest.batch

    def _layout(self, layout: Layout, todo: list[_Configuration], number: int, feeds: Feeds) -> None:
        cores = self.cores if self.threads_matter else None
        memory = DeviceMemory(self.options.backend, self.ctx.hardware)
        with Instances(str(layout), self.options.backend, self.folder, todo[0].runtime, layout, feeds, cores) as all_:
            self.pinned &= all_.pinned
            try:
                all_.load()
            except StageFailure as failure:
                for configuration in todo:
                    self._fail(configuration, failure)
                return
            for i, configuration in enumerate(todo):
                if not configuration.open or not self._in_time(configuration, number):
                    continue
                try:
                    self._measure(all_, configuration, memory)
                except StageFailure as failure:
                    self._fail(configuration, failure)
                    if not all_.alive:
                        if number == 0:
                            for larger in todo[i + 1 :]:
                                larger.dropped = f"not tried: batch {configuration.batch} failed ({failure.code})"
                        return
                else:
                    if number == 0:
                        self._prune(configuration, todo[:i], todo[i + 1 :])
                self.done += 1
                fraction = self.done / (len(self.configurations) * self.options.passes)
                self.ctx.reporter.progress(min(fraction, 1.0), f"{layout} at batch {configuration.batch}")

    def _fail(self, configuration: _Configuration, failure: StageFailure) -> None:
        failure.stage = Sweep.name
        configuration.failed = failure
        self.ctx.reporter.note(f"Configuration {configuration.id} failed: {failure.detail}", code=failure.code)

    def _measure(self, instances: Instances, configuration: _Configuration, memory: DeviceMemory) -> None:
        broken = instances.prepare(configuration.batch, max(0.0, self.ctx.seconds_left() / 4))
        configuration.p50_ns = instances.warm_up(_WARM_UP_CAP_S, _WARM_UP_ITERATIONS)
        configuration.not_finite = sorted({*configuration.not_finite, *broken})
        driven = instances.drive(self._seconds(configuration), configuration.p50_ns)
        if driven.disturbance.disturbed and self.ctx.seconds_left() > _RETAKE_SHARE * self._to_do_s():
            driven = instances.drive(driven.seconds, configuration.p50_ns)
        if not configuration.runs:  # later passes come from large batches to small ones, too
            configuration.memory_mb = instances.memory_mb()
            configuration.gpu_memory_mb = memory.grown_mb()
        configuration.runs.append(driven)

    def _to_do_s(self) -> float:
        """What the windows still to come take, about."""
        windows = len(self.configurations) * self.options.passes - self.done + WINDOWS
        return windows * (self.window_s + _EACH_S)

    def _winner(self, feeds: Feeds) -> None:
        """The configuration that wins, in windows that it was not chosen by."""
        options = self.options
        limits = (options.p99_limit_ms, options.min_throughput_qps, options.max_memory_mb)
        choice = choose([c.to_json() for c in self.configurations], options.objective, *limits, batch=options.batch)
        best = next((c for c in self.configurations if choice.best and c.id == choice.best["id"]), None)
        if best is None:
            return
        if self.ctx.seconds_left() < _EACH_S + WINDOWS * self.window_s + 4 * best.p50_ns / 1e9:
            best.again = winner.again(best.batch, lambda: best.runs[0], lambda: -1.0)
            return
        cores = self.cores if self.threads_matter else None
        with Instances(best.id, options.backend, self.folder, best.runtime, best.layout, feeds, cores) as all_:
            try:
                all_.load()
                all_.prepare(best.batch, max(0.0, self.ctx.seconds_left() / 4))
                p50_ns = all_.warm_up(_WARM_UP_CAP_S, _WARM_UP_ITERATIONS)
                best.again = winner.again(best.batch, lambda: all_.drive(self.window_s, p50_ns), self.ctx.seconds_left)
            except StageFailure as failure:
                self.ctx.reporter.note(f"{best.id} could not be measured again: {failure.detail}", code=failure.code)

    def _seconds(self, configuration: _Configuration) -> float:
        """Of the window; long enough for the samples of a median, and of a p99 where a limit is asked for, where they
        are affordable."""
        each_s = configuration.p50_ns / 1e9 / configuration.layout.instances
        left = self.ctx.seconds_left() / 2
        window_s = max(self.window_s, min(_P50_CAP_S, left, (P50_SAMPLES / self.options.passes + 1) * each_s))
        limit = self.options.p99_limit_ms
        if limit is None:
            return window_s
        if configuration.p50_ns / 1e6 > limit:
            configuration.p99_refused = f"the median misses the limit of {limit:g} ms already"
            return window_s
        cost, affordable = P99_SAMPLES * each_s, min(P99_CAP_S, left)
        if cost > affordable:
            configuration.p99_refused = f"{P99_SAMPLES} samples would take {cost:.0f} s, more than {affordable:.0f} s"
            return window_s
        return max(window_s, 1.15 * cost / self.options.passes)

    def _prune(self, done: _Configuration, before: list[_Configuration], larger: list[_Configuration]) -> None:
        """Leave out the larger batches of this layout where this one misses the p99 limit already, or where calls are
        long and a larger batch no longer brings more."""
        reason = None
        limit = self.options.p99_limit_ms
        seen = distribution(done.latencies())
        carried = [seen[k] for k in ("p90_ms", "p95_ms", "p99_ms") if seen[k] is not None] + [done.p50_ns / 1e6]
        best = max((c.qps for c in before if c.runs), default=0.0)
        if limit is not None and max(carried) > limit:
            reason = f"batch {done.batch} misses the p99 limit of {limit:g} ms already ({max(carried):.3g} ms)"
        elif best and done.p50_ns > _SLOW_NS and done.qps < _GAIN * best:
            reason = f"batch {done.batch} brings no more than smaller ones, and a call takes {done.p50_ns / 1e9:.1f} s"
        for configuration in larger if reason else ():
            configuration.dropped = reason
