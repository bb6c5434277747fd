"""Stage `load_test`: the bundle that ships under the job's traffic, served by the batcher that lies in it; its serving
tuned for that; and the original beside it, with its own default settings."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from app.domain.traffic import Traffic
from workers import hardware
from workers.graph.onnx_files import link_or_copy
from workers.kernel import Backend, Stage, StageContext, StageOptions, StageResult, TensorSpec, backends
from workers.measure.axes import batch_axes, fixed_batch
from workers.measure.instances import default_layouts, usable_cores
from workers.measure.load.arrivals import Arrivals, rate_of
from workers.measure.load.bench import Bench, Clock, Limit
from workers.measure.load.mix import Mix, mix_of
from workers.measure.load.over_http import launch_server
from workers.measure.load.padding import buckets_of, samples_of
from workers.measure.load.served import launch_of, settings_of
from workers.measure.load.trial import Found, Trial, mix_json, serves
from workers.measure.load.tuning import Space
from workers.measure.method import load_method, versions
from workers.members import names_of
from workers.serving.batcher import Settings
from workers.serving.instances import keep_freed_memory
from workers.serving.launching import SERVER
from workers.serving.probe import Padding, padding

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_TIMEOUT = 10.0  # × the limit, where the job does not say when callers leave
_LONGEST_S = 600.0  # where nothing limits the stage
_END, _END_S = 0.1, (2.0, 6.0)  # of the time, to stop what was started and to write the result: seconds between these


class LoadTestOptions(StageOptions):
    """`traffic`: as the job says it. `backend`, `runtime`: of what ships; `baseline_backend`: of the original."""

    traffic: dict[str, Any]
    backend: str
    runtime: dict[str, Any] = Field(default_factory=dict)
    baseline_backend: str
    shapes: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0)


class LoadTest(Stage[LoadTestOptions]):
    """inputs: bundle (the .zip that ships), original (the exported model), [data]. No output.

    data: traffic (arrivals, rate, requests, limit), engine and original {setup, goodput {rate, interval, …}, at_rate,
    beyond, alone_p50_ms, curve [points], …}, served (whether the wanted rate is), serving {settings (what
    `serving.json` holds), brought, kept_start}, tried, padding (which axes may be filled up to which sizes, or why
    none), static, http, generator, reasons, method, conditions, versions.
    """

    name = "load_test"
    version = 5
    Options = LoadTestOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    hardware_bound = True
    loopback = True
    exclusive_device = True
    weight: ClassVar[float] = 6.0

    def run(self, ctx: StageContext, options: LoadTestOptions) -> StageResult:
        traffic = Traffic.model_validate(options.traffic)
        keep_freed_memory()  # as `serve.py` does
        before = hardware.conditions(ctx.hardware)
        bundle = _unpacked(ctx.only_file("bundle"), ctx.workspace / "bundle")
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        known = backends()
        original = _original(
            ctx.inputs["original"], bundle, manifest, known[options.baseline_backend](), ctx.workspace / "original"
        )
        inputs, outputs = _specs(manifest["inputs"]), _specs(manifest["outputs"])
        accepts = manifest.get("engine", {}).get("accepts") or {}
        data = ctx.only_file("data") if "data" in ctx.inputs else None
        mix = mix_of(traffic, inputs, outputs, data=data, ranges=options.shapes, accepts=accepts, seed=options.seed)
        left = min(ctx.seconds_left(), _LONGEST_S)
        ending = min(max(_END * left, _END_S[0]), _END_S[1])
        clock = Clock(time.monotonic() + max(left - ending, 0.5 * left))
        limit = _limit(traffic)
        backend, base = known[options.backend](), _base(bundle, inputs)
        precision = str(manifest.get("engine", {}).get("precision", "fp32"))
        filled = _padding(backend, bundle, options, base, mix, precision)
        base = replace(base, pad=filled.pad, cut=filled.cut)
        one = Settings(reason="as its owner runs it: one by one", batch_axis=base.batch_axis)
        arrivals, rate = Arrivals.of(traffic), rate_of(traffic)
        space = _space(backend, options, base, inputs, accepts, ctx.hardware.get("cpu_quota"))
        launches = [launch_of(bundle, base), launch_of(original, one)]
        if (bundle / SERVER).exists():
            launches.append(launch_server(bundle, base))
        benches = [Bench(x, mix, arrivals, limit, clock, options.seed + 10_000 * i) for i, x in enumerate(launches)]
        served = benches[2] if len(benches) > 2 else None
        trial = Trial(benches[0], benches[1], space, rate, ctx.reporter.progress, served)
        found = asyncio.run(trial.run())
        for folder in (bundle, original):
            shutil.rmtree(folder, ignore_errors=True)
        told = {
            "traffic": {
                "arrivals": arrivals.words,
                "rate_per_second": rate,
                "samples_per_request": round(mix.samples, 4),
                "p99_limit_ms": traffic.slo.p99_latency_ms,
                "timeout_ms": round(1e3 * limit.timeout_s, 3),
                **mix_json(mix),
            },
            **_told(found, base),
            "padding": {
                "sizes": {n: {str(a): list(s) for a, s in axes.items()} for n, axes in filled.pad.items()},
                "refused": filled.refused,
            },
            "cores": len(usable_cores(ctx.hardware.get("cpu_quota"))),
            "method": load_method(arrivals.words),
            "conditions": {"before": before, "after": hardware.conditions(ctx.hardware)},
            "versions": versions([*names_of(options.backend, options.runtime), options.baseline_backend]),
        }
        complete = not found.reasons and (found.tuned is None or found.tuned.complete)
        return StageResult((), {**told, "complete": complete}, reusable=complete)


def _told(found: Found, base: Settings) -> dict[str, Any]:
    """JSON of what was found."""
    tuned = found.tuned
    return {
        "engine": found.engine.to_json(),
        "original": None if found.original is None else found.original.to_json(),
        "served": serves(found.engine.at_rate),
        "original_served": None if found.original is None else serves(found.original.at_rate),
        "serving": {
            "settings": settings_of(base, found.engine.setup).to_json(),
            "brought": found.brought,
            "kept_start": found.kept_start,
        },
        "tried": [t.to_json() for t in tuned.tried] if tuned else [],
        "tuning_seconds": None if tuned is None else round(tuned.seconds, 2),
        "static": None if found.static is None else found.static.to_json(),
        "http": None if found.http is None else found.http.to_json(),
        "generator": found.generator,
        "reasons": found.reasons,
    }


def _limit(traffic: Traffic) -> Limit:
    limit = traffic.slo.p99_latency_ms / 1e3
    timeout = traffic.slo.timeout_ms
    return Limit(limit, _TIMEOUT * limit if timeout is None else timeout / 1e3)


def _specs(told: list[Mapping[str, Any]]) -> list[TensorSpec]:
    return [
        TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), tuple(t["values"]) if t.get("values") else None)
        for t in told
    ]


def _unpacked(archive: Path, folder: Path) -> Path:
    """The bundle as a user unpacks it."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def _original(model: Path, bundle: Path, manifest: Mapping[str, Any], backend: Backend, folder: Path) -> Path:
    """The original as its owner would serve it: the library's defaults, loaded as a bundle's engine is."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        link_or_copy(path, folder / path.name)
    (folder / "infer.py").write_text(backend.infer_script({}), encoding="utf-8")
    told = {"engine": {"precision": "fp32"}, "inputs": manifest["inputs"], "outputs": manifest["outputs"]}
    (folder / "manifest.json").write_text(json.dumps(told), encoding="utf-8")
    shutil.copyfile(bundle / "sample_input.npz", folder / "sample_input.npz")
    return folder


def _base(bundle: Path, inputs: list[TensorSpec]) -> Settings:
    """The bundle's own `serving.json`; where it does not say how requests share a batch, what the inputs tell."""
    base, axes = Settings.of_folder(bundle), batch_axes(inputs)
    if base.batch_axis or base.reason is not None:
        return base
    if any(axis not in (0, None) for axis in axes.values()) or all(axis is None for axis in axes.values()):
        why = "the samples of a batch do not lie along the first axis: it is served one by one"
        return replace(base, max_batch=1, batch_axis=dict.fromkeys(axes), reason=why)
    return replace(base, batch_axis=axes)


def _space(
    backend: Backend,
    options: LoadTestOptions,
    base: Settings,
    inputs: list[TensorSpec],
    accepts: Mapping[str, Any],
    quota: float | None,
) -> Space:
    """What may be tried of this engine on this machine."""
    cores = len(usable_cores(quota))
    one, two = (backend.with_threads(options.runtime, n) for n in (1, 2))
    layouts: list[tuple[int, int | None]] = []
    for layout in default_layouts(cores, threads_matter=one != two):
        own = one == two or (layout.instances == 1 and layout.threads == cores)
        layouts.append((layout.instances, None if own else layout.threads))
    if base.reason is not None or fixed_batch(inputs) is not None:
        return Space(layouts, (1,))
    most = float(_BATCHES[-1])
    for name, axis in batch_axes(inputs).items():
        bound = accepts.get(name, [])[axis] if axis is not None and name in accepts else None
        if bound is not None and bound[1] is not None:
            most = min(most, bound[1])
    return Space(layouts, tuple(b for b in _BATCHES if b <= max(most, 1)), padded=bool(base.pad))


def _padding(
    backend: Backend, bundle: Path, options: LoadTestOptions, base: Settings, mix: Mix, precision: str
) -> Padding:
    """What requests may be filled up to, tried on the engine that ships."""
    batched = [name for name, axis in base.batch_axis.items() if axis == 0]
    wanted = buckets_of(mix, batched) if base.reason is None else {}
    if not wanted:
        return Padding()
    session = backend.load(bundle, options.runtime)
    try:
        return padding(session.run, samples_of(mix, batched), wanted, precision)
    finally:
        session.close()  # before anything is measured: its threads and memory are nobody's then
