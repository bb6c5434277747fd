"""Stage `benchmark`: the baseline and all engines timed side by side, as docs/measurement.md says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from app.domain.failures import FailureKind, StageFailure
from workers import devices, hardware
from workers.kernel import Stage, StageContext, StageResult, backends
from workers.measure import claim, figures
from workers.measure.axes import fixed_batch
from workers.measure.benchmark_options import BASELINE, BenchmarkOptions, EngineOption, again
from workers.measure.bound import bound_seconds, measure_bound
from workers.measure.cold import Cold, cold_start
from workers.measure.device_company import DeviceCompany
from workers.measure.device_memory import DeviceMemory
from workers.measure.disturbance import Disturbance
from workers.measure.engine_child import Feeds, Loaded, Prepared
from workers.measure.engine_process import EngineProcess
from workers.measure.inputs import InputSource
from workers.measure.method import benchmark_method, versions
from workers.measure.plan import LEAST_CALLS
from workers.measure.quiet import Quiet
from workers.measure.rounds import Timing, budget_exhausted, measure
from workers.measure.shape_timing import SHARE, OtherShapes
from workers.members import names_of

AGAIN = again(BASELINE)
_COLD_SHARE = 0.15
_SHAPES_PART = 0.2  # of the progress
_BOUND_SHARE = 0.2  # of the time left, at most, for the cheapest calls beside those that decide
_SCREENING_SHARE = 0.5  # of the time left, at most, for a short timing of every batch size


class Benchmark(Stage[BenchmarkOptions]):
    """inputs: baseline (the exported model), engine.<id> …, [data]. output: samples (raw latencies, `samples.npz`).

    What is timed is the call that a user of the bundle's `infer.py` makes (`kernel.Session.call`; of the baseline
    `InferenceSession.run`); where the time holds it, `bound` {p50_ms, samples, speedup} stands beside it at each batch
    size outside of a screening: the cheapest call, on bound tensors.
    data: method, conditions, versions {distribution: version} of the backends' libraries, noisy, noise, aa {batch:
    {ratio, low, high of p50, throughput {ratio, low, high}}} (empty in a screening), [aa_compared, the same of
    the engine compared with], batch_sizes, skipped_batches {batch: why}, shape {label, dims {input: sizes}, batch,
    in_use, why: what `batches` were timed at}, skipped_shapes [shapes with `reason`], screening, shortened, engines
    {id: {batches {batch: figures, with `compare_to` also against {id, speedup, throughput_ratio}, where an engine asks
    for it also beside {id: {undisturbed, speedup, throughput_ratio} over that one}}, [shapes: likewise at
    those beside the typical, each with label, dims, batch, in_use, or with `failed` or `reason` where there are no
    figures], cold_start_ms, load_ms, first_inference_ms, peak_memory_mb, gpu_memory_mb (10⁶ bytes; the latter of
    engines on a GPU), size_bytes, [reasons], [failed]}}. An engine that fails has `failed` (a StageFailure as JSON);
    only the baseline's failure fails the stage. Where the soft deadline does not hold the plan it is shortened, then
    the last engines are left out (`budget_exhausted`).
    Not reusable by another job: a shortened run, one in which an engine failed as it might not fail again, or one that
    claims nothing because the machine was busy.
    """

    name = "benchmark"
    version = 11
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
        self.engine_of = {name: i for i in self.specs for name in (i, again(i))}  # by the name of a process
        self.folders = {i: ctx.inputs[i if i == BASELINE else f"engine.{i}"] for i in self.specs}
        self.figures = {i: figures.EngineFigures.start(folder, options.cold) for i, folder in self.folders.items()}
        self.skipped: dict[str, str] = {}
        self.aa: dict[str, dict[str, Any]] = {}
        self.aa_compared: dict[str, dict[str, Any]] = {}
        # A short timing tells what is clearly slower; how two processes of one engine differ is the final's to know.
        self.twice = {
            *(() if options.screening else (BASELINE,)),
            *([options.compare_to] if options.compare_to else []),
        }
        self.shortened = False
        self.load_s = self.call_s = 0.0  # of the baseline: what an engine is expected to take
        self.noise: list[str] = ["a short timing claims nothing"] if options.screening else []
        self.windows: list[Disturbance] = []
        self.fraction = 0.0
        self.company = DeviceCompany((s.backend for s in self.specs.values()), ctx.hardware)
        self.quiet = None if options.screening else Quiet(self._waiting)
        self.raw: dict[str, np.ndarray[Any, Any]] = {}
        self.others: OtherShapes | None = None
        self.kept_s = 0.0  # of the time left, for shapes beside the typical

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
                "method": benchmark_method(
                    baseline_backend=self.options.baseline_backend,
                    default_options=not self.options.baseline_runtime,
                    min_seconds=self.options.min_seconds,
                    inputs=words,
                    screening=self.options.screening,
                    cold=self.options.cold,
                ),
                "conditions": {"before": before, "after": hardware.conditions(self.ctx.hardware)},
                "versions": versions(n for e in self.specs.values() for n in names_of(e.backend, e.runtime)),
                "noisy": bool(self.noise) and not self.options.screening,
                "noise": self.noise,
                "disturbance": claim.disturbance(self.windows, self.noise, self.quiet.waited if self.quiet else 0.0),
                "aa": self.aa,
                **({"aa_compared": self.aa_compared} if self.options.compare_to else {}),
                "screening": self.options.screening,
                "shortened": self.shortened,
                "batch_sizes": sorted(feeds),
                "skipped_batches": self.skipped,
                "shape": self.others.typical() if self.others else None,
                "skipped_shapes": self.others.left_out if self.others else [],
                "engines": {i: f.to_json() for i, f in self.figures.items()},
            },
            reusable=not passing and not self.shortened and (not self.noise or self.options.screening),
        )

    def _import_libraries(self) -> None:
        """Once here, and not in every fork."""
        known = backends()
        for engine in self.specs.values():
            names = names_of(engine.backend, engine.runtime)
            for name in (n for n in names if n in known):
                known[name]().probe(self.ctx.hardware)
            if engine.backend not in known:
                detail = f"This worker has no backend {engine.backend!r}."
                self._fail(engine.id, StageFailure("backend_unavailable", detail, FailureKind.REQUEST))

    def _fail(self, engine: str, failure: StageFailure) -> None:
        """An engine's failure is written down; the baseline's is raised: without it nothing can be compared."""
        failure.stage = Benchmark.name
        engine = self.engine_of[engine]
        if engine == BASELINE:
            raise replace(failure, detail=f"The original model cannot be measured. {failure.detail}")
        self.figures[engine].failed = failure
        self.ctx.reporter.note(f"Engine {engine!r} failed in the benchmark: {failure.detail}", code=failure.code)

    def _process(self, name: str, feeds: Prepared | None) -> EngineProcess:
        spec = self.specs[self.engine_of[name]]
        return EngineProcess(name, spec.backend, self.folders[spec.id], spec.runtime, feeds)

    def _alive(self) -> list[str]:
        return [i for i, f in self.figures.items() if f.failed is None]

    # Cold start and memory: a fresh process per engine, forked before any data is read.

    def _cold(self) -> tuple[Feeds, str]:
        """Without `cold` the baseline only: what it takes is known from it."""
        feeds: Feeds = {}
        words = ""
        wanted = self._alive() if self.options.cold else [BASELINE]
        with ExitStack() as stack:
            processes = {i: self._process(i, None) for i in wanted}
            for process in processes.values():
                stack.callback(process.close)
            for done, (i, process) in enumerate(processes.items(), start=1):
                if self.figures[i].failed is None:
                    try:
                        memory = DeviceMemory(self.specs[i].backend, self.ctx.hardware)
                        loaded = process.load()
                        if i == BASELINE:
                            feeds, words = self._feeds(loaded)
                        cold = cold_start(process, loaded, feeds, again=i == BASELINE)
                        cold.gpu_memory_mb = memory.grown_mb()
                        self._write_down_cold(i, cold)
                        if i == BASELINE:
                            feeds = self._essential({b: f for b, f in feeds.items() if b not in cold.refused})
                            self._try_shapes(process, feeds)
                            self._leave_out(feeds, len(processes))
                    except StageFailure as failure:
                        if failure.kind is FailureKind.DATA:
                            raise
                        self._fail(i, failure)
                process.close()
                self.ctx.reporter.progress(_COLD_SHARE * done / len(wanted), f"cold start of {i}")
        return feeds, words

    def _write_down_cold(self, engine: str, cold: Cold) -> None:
        if self.options.cold:
            self.figures[engine].data.update(cold.to_json())
        if engine == BASELINE:
            self.load_s, self.call_s = cold.load_ms / 1e3, cold.call_ms / 1e3
            self.skipped |= {str(b): f"the original model fails: {f.detail}" for b, f in cold.refused.items()}
        elif cold.refused:
            raise next(iter(cold.refused.values()))

    def _essential(self, feeds: Feeds) -> Feeds:
        """All, or the one that counts where a screening of all would take most of the time left."""
        only = self.options.essential
        if not self.options.screening or only is None or only not in feeds or len(feeds) == 1:
            return feeds
        calls = self.call_s * sum(feeds) / min(feeds)
        if self._least_seconds(calls) <= _SCREENING_SHARE * self.ctx.seconds_left():
            return feeds
        self.shortened = True
        self.skipped |= {str(b): "the time left does not hold a short timing of it" for b in feeds if b != only}
        return {only: feeds[only]}

    def _leave_out(self, feeds: Feeds, cold: int = 0) -> None:
        """Leave out the last engines where the time left does not hold them, each as slow as it is expected to be.
        `cold`: of how many engines the cold start is still to be measured."""
        calls = self.call_s * sum(feeds) / min(feeds)
        for engine in reversed(self._alive()):
            expected = self._least_seconds(calls) + cold * (self.load_s + calls)
            if engine == BASELINE or expected <= self.ctx.seconds_left():
                return
            self._fail(engine, budget_exhausted(engine))
            cold = max(0, cold - 1)

    def _least_seconds(self, calls: float) -> float:
        """What the timing of those alive takes at the least; `calls`: seconds of a call of the baseline, of each batch
        size together."""
        processes = [*self._alive(), *self.twice]
        return sum(self.load_s + LEAST_CALLS * calls * self.specs[i].expected for i in processes)

    def _feeds(self, loaded: Loaded) -> tuple[Feeds, str]:
        sizes = sorted(set(self.options.batch_sizes))
        only = fixed_batch(loaded.inputs)
        if only is not None:
            self.skipped = {str(b): f"the model takes batches of {only} only" for b in sizes if b != only}
            sizes = [only]
        file = self.ctx.only_file("data") if "data" in self.ctx.inputs else None
        self.source = InputSource(file, loaded.inputs, loaded.outputs, self.options.shapes, self.options.seed)
        return self.source.typical(sizes)

    def _try_shapes(self, original: EngineProcess, feeds: Feeds) -> None:
        """Which shapes beside the typical one the original takes; after its memory was measured."""
        primary = self.options.essential if self.options.essential in feeds else min(feeds)
        assert primary is not None
        self.others = OtherShapes(self.source, primary)
        if self.options.every_shape:
            self.others.try_on(original, self.call_s * primary / min(feeds), self.ctx.seconds_left())

    # Timing: all engines warm at once, those that others are compared with twice (the baseline not in a screening).

    def _timed(self, feeds: Feeds) -> None:
        self._leave_out(feeds)
        with ExitStack() as stack:
            processes: dict[str, EngineProcess] = {}
            shapes = self.others.feeds if self.others else {}
            prepared: dict[int | str, Any] = dict([*feeds.items(), *shapes.items()])
            compared = [i for i in self._alive() if i in self.twice]
            both = [name for i in compared for name in (i, again(i))]
            for name in (*both, *(i for i in self._alive() if i not in compared)):
                if self.figures[self.engine_of[name]].failed is not None:
                    continue
                process = self._process(name, prepared)
                stack.callback(process.close)
                try:
                    process.load()
                    processes[name] = process
                except StageFailure as failure:
                    self._give_up(processes, name, failure)
            self.kept_s = SHARE * self.ctx.seconds_left() if self.others and self.others.shapes else 0.0
            for done, batch in enumerate(sorted(feeds)):
                self._batch(processes, batch, done, sorted(feeds)[done:])
            self._other_shapes(processes)

    def _other_shapes(self, processes: dict[str, EngineProcess]) -> None:
        """An engine that fails at one of them keeps its other figures: the verdict knows what it does not take."""
        if not self.kept_s or self.others is None:
            return

        def progress(fraction: float) -> None:
            self.ctx.reporter.progress(1 - _SHAPES_PART * (1 - fraction), "other shapes")

        measured = self.others.measure(
            processes,
            min_seconds=self.options.min_seconds,
            rounds=self.options.rounds,
            seed=self.options.seed,
            seconds=min(self.kept_s, self.ctx.seconds_left()),
            always=(BASELINE, AGAIN),
            progress=progress,
            quiet=self.quiet,
        )
        self.windows += [w for found in measured.values() for w in found.windows]
        for engine, found in self.others.figures(measured, BASELINE, AGAIN, self.options.seed).items():
            if engine in self.figures:
                self.figures[engine].shapes = found

    def _give_up(self, processes: dict[str, EngineProcess], name: str, failure: StageFailure) -> None:
        """An engine that fails in one of its processes is gone from all."""
        self._fail(name, failure)
        for other in [n for n in processes if self.engine_of[n] == self.engine_of[name]]:
            processes.pop(other).close()

    def _batch(self, processes: dict[str, EngineProcess], batch: int, done: int, to_do: list[int]) -> None:
        count = done + len(to_do)

        def progress(fraction: float) -> None:
            rest = 1 - _COLD_SHARE - (_SHAPES_PART if self.kept_s else 0.0)
            self.fraction = _COLD_SHARE + rest * (done + fraction) / count
            self.ctx.reporter.progress(self.fraction, f"batch {batch}: {len(processes)} processes in turn")

        found = measure(
            processes,
            batch,
            min_seconds=self.options.min_seconds,
            rounds=self.options.rounds,
            want_p99=self.options.want_p99,
            seed=self.options.seed,
            progress=progress,
            screening=self.options.screening,
            ends=time.monotonic() + self._share(to_do),
            always=(BASELINE, AGAIN),
            quiet=self.quiet,
            company=self.company,
        )
        self.windows += found.windows
        self.shortened |= found.shortened
        for name, failure in found.failures.items():
            self._give_up(processes, name, failure)
        whole = {n: t for n, t in found.timings.items() if n in processes}
        self._write_down(whole, batch, found.windows)
        if not self.options.screening:
            self._bound(processes, whole, batch)
            self._profile(processes, batch)

    def _bound(self, processes: dict[str, EngineProcess], timings: dict[str, Timing], batch: int) -> None:
        """The cheapest calls, in short windows: they stand beside what decides, and cost no engine its place."""
        p50_ns = {i: float(np.median(t.all())) for i, t in timings.items() if i in self.figures}
        if bound_seconds(p50_ns.values()) > _BOUND_SHARE * self.ctx.seconds_left():
            return
        alone = {i: processes[i] for i in p50_ns}
        found, samples, failed = measure_bound(alone, p50_ns, BASELINE, self.options.seed)
        for i, at in found.items():
            self.figures[i].batches[str(batch)]["bound"] = at
            self.raw[f"{i}|{batch}|bound_ns"] = samples[i]
        for i, failure in failed.items():
            self.ctx.reporter.note(f"Engine {i!r} has no bound call: {failure.detail}", code=failure.code)

    def _waiting(self) -> None:
        self.ctx.reporter.progress(max(self.fraction, _COLD_SHARE), "waiting for a quiet machine")

    def _share(self, batches: list[int]) -> float:
        """Seconds that the first of `batches` may take of those left: large batches take longer."""
        weights = [self.options.min_seconds + LEAST_CALLS * self.call_s * b / batches[0] for b in batches]
        return self.ctx.seconds_left() * (1 - (SHARE if self.kept_s else 0)) * weights[0] / sum(weights)

    def _profile(self, processes: dict[str, EngineProcess], batch: int) -> None:
        """Some devices tell transfers, compute and submission apart, in a pass of its own after the timing."""
        for name, process in list(processes.items()):
            spec = self.specs.get(name)  # none: a second process of an engine that is there already
            if spec is None or not devices.of_backend(spec.backend).tells_parts:
                continue
            try:
                self.figures[name].batches[str(batch)]["profile"] = process.profile(batch)
            except StageFailure as failure:  # its latencies stand; what broke the profile may have broken the process
                self.ctx.reporter.note(f"Engine {name!r} could not be profiled: {failure.detail}", code=failure.code)

    def _write_down(self, timings: dict[str, Timing], batch: int, windows: Sequence[Disturbance]) -> None:
        seed = self.options.seed
        baseline = timings[BASELINE]
        second = timings.get(AGAIN, baseline)
        if second is not baseline:
            aa = figures.a_a(baseline, second, seed)
            self.aa[str(batch)] = aa.to_json()
            device = devices.of_backend(self.options.baseline_backend)
            self.noise += claim.objections(batch, baseline, second, aa.p50, windows=windows, device=device)
        other = self.options.compare_to
        pair = (timings[other], timings[again(other)]) if other and other in timings else None
        if pair is not None:
            self.aa_compared[str(batch)] = figures.a_a(*pair, seed).to_json()
        for name, timing in timings.items():
            self.raw[f"{name}|{batch}|latency_ns"] = np.concatenate(timing.rounds)
            self.raw[f"{name}|{batch}|round"] = np.repeat(
                np.arange(len(timing.rounds), dtype=np.int16), [len(r) for r in timing.rounds]
            )
            self.raw[f"{name}|{batch}|disturbed"] = np.array(sorted(timing.disturbed), np.int16)
            if self.engine_of[name] != name:
                continue
            found = figures.itself() if name == BASELINE else figures.comparison(baseline, second, timing, seed)
            at = {**figures.latency_figures(timing, batch, screening=self.options.screening), **found}
            if pair is not None:
                found = figures.itself() if name == other else figures.comparison(*pair, timing, seed)
                at["against"] = {"id": other, **found}
            if self.specs[name].beside:
                rivals = [i for i in self.specs if i in timings and i not in (name, BASELINE)]
                at["beside"] = {i: figures.beside(timings[i], timing, seed) for i in rivals}
            self.figures[name].batches[str(batch)] = at
