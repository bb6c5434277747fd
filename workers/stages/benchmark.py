"""Stage `benchmark`: the baseline and all engines timed side by side, as docs/measurement.md says."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field, StringConstraints, field_validator

from app.domain.failures import FailureKind, StageFailure
from workers import hardware
from workers.data import Samples
from workers.kernel import Stage, StageContext, StageOptions, StageResult, backends
from workers.measure import figures
from workers.measure.cold import cold_start
from workers.measure.engine_process import EngineProcess, Feeds, Loaded
from workers.measure.inputs import DISTINCT, fixed_batch, rotating_feeds
from workers.measure.rounds import MIN_ROUNDS, Timing, measure
from workers.measure.stats import holds_one

BASELINE = "baseline"
AGAIN = "baseline (again)"
_COLD_SHARE = 0.15
_WIDE = 1.25  # high over low of an A/A interval, beyond which it says next to nothing


class EngineOption(StageOptions):
    """One engine: the input artifact `engine.<id>`, and how its backend loads it."""

    id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)


class BenchmarkOptions(StageOptions):
    """`min_seconds` is measured per engine and batch size, over all rounds. `shapes`: as in the job's spec."""

    engines: list[EngineOption] = Field(default_factory=list, max_length=64)
    batch_sizes: list[Annotated[int, Field(ge=1, le=4096)]] = Field(default=[1, 8], min_length=1, max_length=16)
    min_seconds: float = Field(default=3.0, gt=0, le=600)
    rounds: int = Field(default=10, ge=5, le=100)
    shapes: dict[str, Any] | None = None
    want_p99: bool = False
    seed: int = Field(default=0, ge=0)
    baseline_backend: str = "onnxruntime"
    baseline_runtime: dict[str, Any] = Field(default_factory=dict)

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: list[EngineOption]) -> list[EngineOption]:
        ids = [e.id for e in engines]
        if len(set(ids)) != len(ids) or BASELINE in ids:
            raise ValueError("engine ids must be distinct, and none may be 'baseline'")
        return engines


@dataclass
class _Figures:
    """What is known of one engine so far."""

    data: dict[str, Any]
    batches: dict[str, Any] = field(default_factory=dict)
    failed: StageFailure | None = None

    @classmethod
    def start(cls, folder: Path) -> _Figures:
        unknown = dict.fromkeys(("cold_start_ms", "load_ms", "first_inference_ms", "peak_memory_mb"))
        return cls({**unknown, "size_bytes": sum(p.stat().st_size for p in folder.iterdir())})

    def to_json(self) -> dict[str, Any]:
        failed = {} if self.failed is None else {"failed": self.failed.to_json()}
        return {"batches": self.batches, **self.data, **failed}


class Benchmark(Stage[BenchmarkOptions]):
    """inputs: baseline (the exported model), engine.<id> …, [data]. output: samples (raw latencies, `samples.npz`).

    data: method, conditions, versions {distribution: version} of the backends' libraries, noisy, noise, aa {batch:
    {ratio, low, high of p50, throughput {ratio, low, high}}}, batch_sizes, skipped_batches {batch: why}, engines {id:
    {batches {batch: figures}, cold_start_ms, load_ms, first_inference_ms, peak_memory_mb (10⁶ bytes), size_bytes,
    [failed]}}. An engine that fails has `failed` (a StageFailure as JSON); only the baseline's failure fails the stage.
    Not reusable by another job: a run in which an engine failed as it might not fail again. A noisy one is (the same
    job again answers at once); who wants it measured anew asks for another `min_seconds`, as the report advises.
    """

    name = "benchmark"
    version = 2
    Options = BenchmarkOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnxruntime", "numpy")
    hardware_bound = True
    exclusive_device = True

    def run(self, ctx: StageContext, options: BenchmarkOptions) -> StageResult:
        return _Run(ctx, options).result()


class _Run:
    """One benchmark: what is known of each engine fills up from phase to phase."""

    def __init__(self, ctx: StageContext, options: BenchmarkOptions) -> None:
        self.ctx = ctx
        self.options = options
        baseline = EngineOption(id=BASELINE, backend=options.baseline_backend, runtime=options.baseline_runtime)
        self.specs = {e.id: e for e in (baseline, *options.engines)}
        self.folders = {i: ctx.inputs[i if i == BASELINE else f"engine.{i}"] for i in self.specs}
        self.figures = {i: _Figures.start(folder) for i, folder in self.folders.items()}
        self.skipped: dict[str, str] = {}
        self.aa: dict[str, dict[str, Any]] = {}
        self.noise: list[str] = []
        self.raw: dict[str, np.ndarray[Any, Any]] = {}

    def result(self) -> StageResult:
        before = hardware.conditions(self.ctx.hardware)
        self._import_libraries()
        feeds, words = self._cold()
        self._timed(feeds)
        folder = self.ctx.output("samples")
        np.savez_compressed(folder / "samples.npz", **self.raw)  # type: ignore[arg-type]  # numpy types **kwds as bool
        passing = any(f.failed is not None and not f.failed.cacheable for f in self.figures.values())
        return StageResult(
            ("samples",),
            {
                "method": self._method(words),
                "conditions": {"before": before, "after": hardware.conditions(self.ctx.hardware)},
                "versions": _versions(engine.backend for engine in self.specs.values()),
                "noisy": bool(self.noise),
                "noise": self.noise,
                "aa": self.aa,
                "batch_sizes": sorted(feeds),
                "skipped_batches": self.skipped,
                "engines": {i: f.to_json() for i, f in self.figures.items()},
            },
            reusable=not passing,
        )

    def _import_libraries(self) -> None:
        """Once here, and not in every fork."""
        known = backends()
        for engine in self.specs.values():
            if engine.backend in known:
                known[engine.backend]().probe(self.ctx.hardware)
            else:
                detail = f"This worker has no backend {engine.backend!r}."
                self._fail(engine.id, StageFailure("backend_unavailable", detail, FailureKind.REQUEST))

    def _fail(self, engine: str, failure: StageFailure) -> None:
        """An engine's failure is written down; the baseline's is raised: without it nothing can be compared."""
        failure.stage = Benchmark.name
        if engine in (BASELINE, AGAIN):
            raise replace(failure, detail=f"The original model cannot be measured. {failure.detail}")
        self.figures[engine].failed = failure
        self.ctx.reporter.note(f"Engine {engine!r} failed in the benchmark: {failure.detail}", code=failure.code)

    def _process(self, name: str, feeds: Feeds | None) -> EngineProcess:
        spec = self.specs[BASELINE if name == AGAIN else name]
        return EngineProcess(name, spec.backend, self.folders[spec.id], spec.runtime, feeds)

    def _alive(self) -> list[str]:
        return [i for i, f in self.figures.items() if f.failed is None]

    # Cold start and memory: a fresh process per engine, forked before any data is read.

    def _cold(self) -> tuple[Feeds, str]:
        alive = self._alive()
        feeds: Feeds = {}
        words = ""
        with ExitStack() as stack:
            processes = {i: self._process(i, None) for i in alive}
            for process in processes.values():
                stack.callback(process.close)
            for done, (i, process) in enumerate(processes.items(), start=1):
                try:
                    loaded = process.load()
                    if i == BASELINE:
                        feeds, words = self._feeds(loaded)
                    cold = cold_start(process, loaded, feeds)
                    self.figures[i].data.update(cold.to_json())
                    if i == BASELINE:
                        self.skipped |= {
                            str(b): f"the original model fails: {f.detail}" for b, f in cold.refused.items()
                        }
                        feeds = {b: f for b, f in feeds.items() if b not in cold.refused}
                    elif cold.refused:
                        raise next(iter(cold.refused.values()))
                except StageFailure as failure:
                    if failure.kind is FailureKind.DATA:
                        raise
                    self._fail(i, failure)
                process.close()
                self.ctx.reporter.progress(_COLD_SHARE * done / len(alive), f"cold start of {i}")
        return feeds, words

    def _feeds(self, loaded: Loaded) -> tuple[Feeds, str]:
        sizes = sorted(set(self.options.batch_sizes))
        only = fixed_batch(loaded.inputs)
        if only is not None:
            self.skipped = {str(b): f"the model takes batches of {only} only" for b in sizes if b != only}
            sizes = [only]
        samples = None
        if "data" in self.ctx.inputs:
            file = self.ctx.only_file("data")
            samples = Samples(file, loaded.inputs, loaded.outputs, max_samples=DISTINCT * max(sizes))
        return rotating_feeds(loaded.inputs, sizes, samples, self.options.shapes, self.options.seed)

    # Timing: all engines warm at once, the baseline twice.

    def _timed(self, feeds: Feeds) -> None:
        with ExitStack() as stack:
            processes: dict[str, EngineProcess] = {}
            for name in (BASELINE, AGAIN, *(i for i in self._alive() if i != BASELINE)):
                process = self._process(name, feeds)
                stack.callback(process.close)
                try:
                    process.load()
                    processes[name] = process
                except StageFailure as failure:
                    self._fail(name, failure)
            for done, batch in enumerate(sorted(feeds)):
                self._batch(processes, batch, done, len(feeds))

    def _batch(self, processes: dict[str, EngineProcess], batch: int, done: int, count: int) -> None:
        def progress(fraction: float) -> None:
            part = _COLD_SHARE + (1 - _COLD_SHARE) * (done + fraction) / count
            self.ctx.reporter.progress(part, f"batch {batch}: {len(processes)} processes in turn")

        timings, failures = measure(
            processes,
            batch,
            min_seconds=self.options.min_seconds,
            rounds=self.options.rounds,
            want_p99=self.options.want_p99,
            seed=self.options.seed,
            progress=progress,
        )
        for name, failure in failures.items():
            processes.pop(name).close()
            self._fail(name, failure)
        self._write_down(timings, batch)
        self._profile(processes, batch)

    def _profile(self, processes: dict[str, EngineProcess], batch: int) -> None:
        """Engines on a GPU also tell transfers, compute and submission apart, in a pass of its own after the timing."""
        for name, process in list(processes.items()):
            if name == AGAIN or backends()[self.specs[name].backend].device == "cpu":
                continue
            try:
                self.figures[name].batches[str(batch)]["profile"] = process.profile(batch)
            except StageFailure as failure:  # its latencies stand; what broke the profile may have broken the process
                self.ctx.reporter.note(f"Engine {name!r} could not be profiled: {failure.detail}", code=failure.code)

    def _write_down(self, timings: dict[str, Timing], batch: int) -> None:
        seed = self.options.seed
        baseline, again = timings[BASELINE], timings[AGAIN]
        aa = figures.a_a(baseline, again, seed)
        interval = aa.p50
        self.aa[str(batch)] = aa.to_json()
        if not holds_one(interval):
            self.noise.append(
                f"batch {batch}: the baseline against itself is {interval.ratio:.3f} "
                f"[{interval.low:.3f}, {interval.high:.3f}], which does not hold 1.0"
            )
        elif interval.high > interval.low * _WIDE:
            self.noise.append(
                f"batch {batch}: the baseline against itself is anywhere in [{interval.low:.3f}, {interval.high:.3f}]: "
                "small gains cannot be told from noise"
            )
        if not holds_one(aa.throughput):
            self.noise.append(
                f"batch {batch}: the throughput of the baseline against itself is {aa.throughput.ratio:.3f} "
                f"[{aa.throughput.low:.3f}, {aa.throughput.high:.3f}], which does not hold 1.0"
            )
        for name, timing in timings.items():
            self.raw[f"{name}|{batch}|latency_ns"] = timing.all()
            self.raw[f"{name}|{batch}|round"] = np.repeat(
                np.arange(len(timing.rounds), dtype=np.int16), [len(r) for r in timing.rounds]
            )
            if name != AGAIN:
                against = figures.itself() if name == BASELINE else figures.comparison(baseline, again, timing, seed)
                self.figures[name].batches[str(batch)] = {**figures.latency_figures(timing, batch), **against}

    def _method(self, inputs: str) -> dict[str, str]:
        options = self.options
        session = "the given options" if options.baseline_runtime else "default options"
        return {
            "baseline": f"the original model, exported to ONNX, on {options.baseline_backend} with {session}, "
            "measured in the same run",
            "rounds": "all engines in turn (A B C A B C …), each in a warm process of its own, the order drawn anew "
            f"every round; at least {MIN_ROUNDS} rounds, {options.min_seconds:g} s per engine and batch size",
            "warm_up": "until three windows agree within 10 %, after at least 50 iterations or 1 s; a few uncounted "
            "iterations at the start of every window",
            "inputs": inputs,
            "latency": "wall time of one call with bound inputs, one caller (closed loop), no copies in Python",
            "percentiles": "nearest rank; shown from p50 11, p90 64, p95 130, p99 662, p99.9 6,636 samples on",
            "speedup": "p50 of the baseline / p50 of the engine; 95 % interval by block bootstrap over rounds, against "
            "both baseline processes",
            "throughput": "batch size / mean latency, in samples per second, one caller",
            "a_a": "the baseline in two processes against each other, by p50 and by throughput; noisy where an "
            "interval does not hold 1.0",
            "cold_start": "load and first inference in a fresh process, the library already imported, files in "
            "the disk cache",
            "memory": "peak resident memory of that process in MB (10⁶ bytes), interpreter and library included, after "
            "one inference at each batch size",
        }


def _versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions of the distributions behind these backends, under the name they are installed by."""
    known = backends()
    versions: dict[str, str] = {}
    for library in sorted({lib for name in names if name in known for lib in known[name].libraries}):
        for distribution in (library, f"{library}-gpu"):
            try:
                versions[distribution] = importlib.metadata.version(distribution)
                break
            except importlib.metadata.PackageNotFoundError:
                continue
    return versions
