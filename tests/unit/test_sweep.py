"""The sweep on real models: batch sizes, instances and threads; and the choice among what it found."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import faulty, onnx_models
from workers.hardware import describe
from workers.kernel import Reporter, StageContext
from workers.measure import winner
from workers.measure.deployment import batching_pays, choose, cost_per_million, pareto
from workers.measure.disturbance import Disturbance
from workers.measure.instances import Driven, Instances, Layout, default_layouts, usable_cores
from workers.measure.plan import expected_sweep_seconds
from workers.measure.winner import throughput_of
from workers.pipeline.deployment import deployment_config
from workers.stages.sweep import Sweep, SweepOptions

ONE = {"instances": 1, "threads": 1}
TWO = {"instances": 2, "threads": 1}


class Notes(Reporter):
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.notes: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.fractions.append(fraction)

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append(message)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return onnx_models.folder(onnx_models.mlp(features=32, hidden=64), tmp_path / "engine")


@pytest.fixture
def swept(tmp_path: Path, engine: Path) -> Callable[..., Any]:
    def run(
        *, folder: Path = engine, data: Path | None = None, seconds_left: float | None = None, **options: Any
    ) -> Any:
        inputs = {"engine": folder, **({"data": data} if data else {})}
        soft = None if seconds_left is None else time.monotonic() + seconds_left
        reporter = Notes()
        ctx = StageContext(inputs, tmp_path, tmp_path / "out", reporter, describe(), soft)
        given = {"backend": "onnxruntime", "batch_sizes": [1, 4], "layouts": [ONE], "min_seconds": 0.1, **options}
        result = Sweep().run(ctx, SweepOptions(**given))
        json.dumps(result.data, allow_nan=False)
        assert result.outputs == ("samples",)
        assert reporter.fractions == sorted(reporter.fractions)
        by_id = {c["id"]: c for c in result.data["configurations"]}
        return {**result.data, "reusable": result.reusable, "by_id": by_id, "notes": reporter.notes}

    return run


def test_every_figure_of_a_sweep(swept: Callable[..., Any], tmp_path: Path) -> None:
    data = swept(layouts=[ONE, TWO], min_seconds=0.2)
    assert set(data["by_id"]) == {"1x1@1", "1x1@4", "2x1@1", "2x1@4"}
    assert (data["complete"], data["shortened"], data["reusable"]) == (True, False, True)
    assert data["cores"] == len(usable_cores(describe()["cpu_quota"]))
    assert "closed loop" in data["method"]["load"]
    with np.load(tmp_path / "out/samples/samples.npz", allow_pickle=False) as raw:
        for name, c in data["by_id"].items():
            assert (c["status"], c["passes"]) == ("measured", 2)
            assert 0 < c["p50_ms"] <= c["p90_ms"] <= c["p99_ms"] <= c["max_ms"]
            assert c["ms_per_sample"] == pytest.approx(1000 / c["throughput_qps"], rel=1e-4)
            assert c["runtime"] == {"intra_op_num_threads": 1}
            assert len(c["throughput_by_pass"]) == len(c["p50_by_pass"]) == 2
            assert c["samples"] == sum(len(raw[f"{name}|{i}"]) for i in range(2))
            # One caller per instance: what it completes in a second is about 1 / mean latency.
            alone = c["batch"] * 1000 / c["mean_ms"] * c["instances"]
            assert c["throughput_qps"] == pytest.approx(alone, rel=0.5)
    one, two = data["by_id"]["1x1@1"], data["by_id"]["2x1@1"]
    assert 10 < one["memory_mb"] < two["memory_mb"] < 3 * one["memory_mb"]


def test_instances_run_at_the_same_time(swept: Callable[..., Any]) -> None:
    """An engine that sleeps needs no core: four instances do four times the work of one, wherever this runs."""
    runtime = {"sleep_s": 0.02}
    layouts = [{"instances": n, "threads": 1} for n in (1, 4)]
    data = swept(backend="test-faulty", runtime=runtime, layouts=layouts, batch_sizes=[1], min_seconds=0.6)
    one, four = data["by_id"]["1x1@1"], data["by_id"]["4x1@1"]
    assert 2.5 < four["throughput_qps"] / one["throughput_qps"] < 5
    assert four["p50_ms"] >= 20
    assert data["threads_matter"] is False
    assert data["pinned"] is False


def test_each_instance_has_its_own_cores(engine: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    layout = Layout(instances=len(cores), threads=1)
    with Instances("x", "onnxruntime", engine, {"intra_op_num_threads": 1}, layout, {}, cores) as found:
        found.load()
        assert [os.sched_getaffinity(p.pid) for p in found.processes] == [{c} for c in cores]
        assert found.pinned
    assert not found.alive
    too_many = Layout(instances=len(cores) + 1, threads=1)
    with Instances("x", "onnxruntime", engine, {}, too_many, {}, cores) as found:
        assert not found.pinned


def test_a_call_longer_than_the_window_makes_it_longer(engine: Path) -> None:
    feeds = {1: [{"input": np.ones((1, 32), np.float32)}]}
    layout = Layout(instances=2, threads=1)
    with Instances("x", "test-faulty", engine, {"sleep_s": 0.1}, layout, feeds) as found:
        found.load()
        found.prepare(1)
        driven = found.drive(0.15, 1e6)  # holds one call; the second try holds two
        assert driven.seconds == pytest.approx(0.3)
        assert driven.calls_per_s == pytest.approx(20, rel=0.3)
        with pytest.raises(StageFailure) as caught:
            found.drive(0.001, 1e3)
        assert (caught.value.code, caught.value.cacheable) == ("engine_timeout", False)
        assert found.alive


def test_how_long_a_sweep_is_expected_to_take() -> None:
    small = expected_sweep_seconds({1: 0.1, 8: None}, layouts=3)
    assert 6 < small < 12
    assert expected_sweep_seconds({1: 500.0}, layouts=3) > 3 * 11


def test_shared_pages_count_once(engine: Path) -> None:
    def memory(instances: int) -> float:
        layout = Layout(instances=instances, threads=1)
        with Instances("x", "onnxruntime", engine, {"intra_op_num_threads": 1}, layout, {}) as found:
            found.load()
            resident = sum(
                int(line.split()[1]) * 1024 / 1e6
                for p in found.processes
                for line in Path(f"/proc/{p.pid}/status").read_text().splitlines()
                if line.startswith("VmHWM:")
            )
            assert 1 < found.memory_mb() < 0.95 * resident  # the libraries are shared
            return found.memory_mb()

    assert memory(3) < 3 * memory(1)


def test_larger_batches_beyond_the_p99_limit_are_not_measured(swept: Callable[..., Any]) -> None:
    runtime = {"per_sample_s": 0.005}
    data = swept(backend="test-faulty", runtime=runtime, batch_sizes=[1, 3, 4, 8], p99_limit_ms=12, passes=1)
    by_id = data["by_id"]
    assert by_id["1x1@1"]["p99_ms"] > 5
    missing = by_id["1x1@3"]  # its median tells enough, and those beyond it are not tried
    assert (missing["status"], missing["p99_ms"]) == ("measured", None)
    assert "median misses" in missing["reasons"]["p99_ms"]
    assert {by_id[f"1x1@{b}"]["status"] for b in (4, 8)} == {"not_measured"}
    assert "misses the p99 limit of 12 ms" in by_id["1x1@8"]["reason"]
    assert data["reusable"] is True


def test_the_samples_of_a_p99_are_gone_for(swept: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = {"sleep_s": 0.001}
    data = swept(backend="test-faulty", runtime=runtime, batch_sizes=[1], p99_limit_ms=50)
    assert data["by_id"]["1x1@1"]["p99_ms"] > 1
    monkeypatch.setattr("workers.stages.sweep.P99_CAP_S", 0.5)
    data = swept(backend="test-faulty", runtime=runtime, batch_sizes=[1], p99_limit_ms=50)
    found = data["by_id"]["1x1@1"]
    assert found["p99_ms"] is None
    assert "more than" in found["reasons"]["p99_ms"]
    assert choose([found], "latency", 50).best is None


def test_what_fails_is_written_down(swept: Callable[..., Any], tmp_path: Path) -> None:
    lies = onnx_models.folder(faulty.takes_one_only(), tmp_path / "lies")
    data = swept(folder=lies, layouts=[ONE, TWO])
    assert data["by_id"]["1x1@1"]["status"] == data["by_id"]["2x1@1"]["status"] == "measured"
    refused = data["by_id"]["1x1@4"]
    assert (refused["status"], refused["failed"]["code"]) == ("failed", "inference_failed")
    assert refused["failed"]["stage"] == "sweep"
    crash = {"backend": "test-faulty", "layouts": [TWO], "batch_sizes": [1, 4, 8]}
    data = swept(**crash, runtime={"signal_at_batch": 4, "signal": int(signal.SIGSEGV)})
    assert data["by_id"]["2x1@1"]["status"] == "measured"
    assert data["by_id"]["2x1@4"]["failed"]["code"] == "engine_crashed"
    assert "batch 4 failed (engine_crashed)" in data["by_id"]["2x1@8"]["reason"]
    data = swept(**crash, runtime={"signal_at_batch": 4, "signal": int(signal.SIGKILL)})
    assert data["by_id"]["2x1@4"]["failed"]["code"] == "out_of_memory"
    assert data["reusable"] is False


def test_an_engine_that_does_not_load_fails_the_stage(swept: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.onnx").write_bytes(b"junk")
    with pytest.raises(StageFailure) as caught:
        swept(folder=tmp_path / "bad")
    assert caught.value.stage == "sweep"
    with pytest.raises(StageFailure) as caught:
        swept(backend="nobody")
    assert caught.value.code == "backend_unavailable"


def test_a_fixed_batch_is_the_only_one(swept: Callable[..., Any], tmp_path: Path) -> None:
    fixed = onnx_models.folder(onnx_models.mlp(features=32, batch=3), tmp_path / "fixed")
    data = swept(folder=fixed, batch_sizes=[1, 4])
    assert (data["batch_sizes"], data["fixed_batch"]) == ([3], 3)
    assert set(data["skipped_batches"]) == {"1", "4"}
    assert set(data["by_id"]) == {"1x1@3"}


def test_a_soft_deadline_stops_the_sweep(swept: Callable[..., Any]) -> None:
    slow = {"backend": "test-faulty", "runtime": {"sleep_s": 0.05}, "batch_sizes": [1, 2, 4, 8], "layouts": [ONE, TWO]}
    start = time.monotonic()
    data = swept(**slow, min_seconds=20, seconds_left=3)
    assert time.monotonic() - start < 15  # of more than 80 s that it would take
    assert (data["complete"], data["reusable"]) == (False, False)
    statuses = [c["status"] for c in data["configurations"]]
    assert statuses[0] == "measured"
    assert "not_measured" in statuses
    assert all("time ran out" in c["reason"] for c in data["configurations"] if c["status"] == "not_measured")
    none = swept(**slow, seconds_left=0)
    config = _config(none)
    assert "time ran out" in config.reasons["choice"]
    assert config.instances is None


def test_inputs_of_the_data_set(swept: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "d.npz", input=np.ones((40, 32), np.float32))
    assert "samples of the data set" in swept(data=tmp_path / "data")["method"]["inputs"]
    np.savez(tmp_path / "data" / "d.npz", input=np.ones((40, 5), np.float32))
    with pytest.raises(StageFailure):
        swept(data=tmp_path / "data")


def test_ways_to_share_the_cores() -> None:
    assert [str(x) for x in default_layouts(8)] == ["1×8", "2×4", "4×2", "8×1", "1×1"]
    assert [str(x) for x in default_layouts(1)] == ["1×1"]
    assert [x.instances for x in default_layouts(8, threads_matter=False)] == [1, 2, 4]
    assert len(usable_cores(1.5)) == 1
    assert usable_cores(None) == sorted(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="distinct"):
        SweepOptions(backend="x", layouts=[ONE, ONE])


# The choice


def _measured(batch: int, instances: int, p50: float, qps: float, p99: float | None = None, mb: float = 100) -> Any:
    return {
        "id": f"{instances}x1@{batch}",
        "status": "measured",
        "batch": batch,
        "instances": instances,
        "threads": 1,
        "runtime": {"intra_op_num_threads": 1},
        "mean_ms": p50,
        "p50_ms": p50,
        "p99_ms": p50 * 1.2 if p99 is None else p99,
        "p99_bound_ms": p50 * 1.5 if p99 is None else p99,
        "throughput_qps": qps,
        "memory_mb": mb,
        "reasons": {},
    }


TABLE = [
    _measured(1, 1, 5, 200),
    _measured(8, 1, 20, 400),
    _measured(1, 4, 8, 500, mb=350),
    _measured(8, 4, 40, 800, mb=380),
    _measured(32, 4, 160, 810, mb=500),
    {"id": "8x1@1", "status": "failed", "batch": 1, "instances": 8, "threads": 1, "reason": "out of memory"},
]


def _config(data: Mapping[str, Any] | None, **spec: Any) -> Any:
    return deployment_config(
        data,
        picked_backend="onnxruntime",
        precision="int8",
        runtime={"x": 1},
        dynamic_batch=spec.pop("dynamic_batch", True),
        spec=OptimizationSpec.model_validate({"model_id": "m", **spec}),
    )


@pytest.mark.parametrize(
    ("objective", "limits", "best"),
    [
        ("latency", {}, "1x1@1"),
        ("latency", {"batch": 8}, "1x1@8"),
        ("latency", {"batch": 7}, "1x1@1"),
        ("latency", {"min_throughput_qps": 300}, "4x1@1"),
        ("throughput", {}, "4x1@8"),  # batch 32 is no better beyond the noise, and takes more memory
        ("throughput", {"p99_limit_ms": 50}, "4x1@1"),
        ("throughput", {"p99_limit_ms": 10}, "1x1@1"),
        ("throughput", {"max_memory_mb": 200}, "1x1@8"),
        ("cost", {"price_per_hour": 3.6}, "4x1@8"),
        ("cost", {"p99_limit_ms": 30}, "4x1@1"),
    ],
)
def test_the_best_by_each_objective(objective: str, limits: dict[str, Any], best: str) -> None:
    choice = choose(TABLE, objective, **limits)
    assert choice.best is not None
    assert choice.best["id"] == best, choice.reason
    assert choice.pareto == ["1x1@1", "4x1@1", "4x1@8", "4x1@32"]


def test_what_is_said_of_the_choice_is_true_of_the_table() -> None:
    """The winner of a tie never claims the figure that another one has."""
    assert (
        choose(TABLE, "latency").reason == "1 instance(s) × 1 thread(s) at batch 1 has the lowest p50: 5 ms at batch 1"
    )
    tied = choose(TABLE, "throughput")
    assert "has 800 samples/s, which cannot be told from the highest throughput (810 samples/s, 4 inst" in tied.reason
    assert tied.reason.endswith("with less memory")
    near = [{**_measured(1, 2, 5.0, 380), "p50_by_pass": [4.8, 5.2]}, {**_measured(1, 1, 5.2, 190, mb=50)}]
    apart = [near[0], {**near[1], "p50_by_pass": [5.3, 5.4]}]
    overlap = [near[0], {**near[1], "p50_by_pass": [5.1, 5.3]}]
    assert [choose(t, "latency").best["instances"] for t in (near, apart, overlap)] == [2, 2, 1]  # type: ignore[index]
    assert (
        "5.2 ms at batch 1, which cannot be told from the lowest p50 (5 ms at batch 1"
        in choose(overlap, "latency").reason
    )


def test_nothing_fits_and_what_would_have_to_give() -> None:
    choice = choose(TABLE, "throughput", p99_limit_ms=5)
    assert choice.best is None
    assert choice.nearest is not None
    assert choice.nearest["id"] == "1x1@1"
    assert choice.relax == {"constraints.p99_latency_ms": 7.5}
    unknown = [{**c, "p99_bound_ms": None, "reasons": {"p99_bound_ms": "12 samples"}} for c in TABLE[:2]]
    choice = choose(unknown, "latency", p99_limit_ms=1000)
    assert choice.best is None  # a p99 that the samples do not carry is not taken on trust
    assert choice.relax == {"constraints.p99_latency_ms": None}
    assert "12 samples" in choice.reason
    assert choose(unknown, "latency").best is not None
    assert choose([TABLE[-1]], "latency").reason.endswith("out of memory")
    assert choose([], "latency").best is None


def test_cost_and_batching() -> None:
    assert cost_per_million(1000, 3.6) == pytest.approx(1.0)
    assert cost_per_million(1000, None) == pytest.approx(1 / 3.6)
    assert "relative" in choose(TABLE, "cost").reason
    assert batching_pays(TABLE, TABLE[1]) is True
    assert batching_pays(TABLE, TABLE[0]) is False
    assert batching_pays([*TABLE[:1], _measured(8, 1, 40, 210)], _measured(8, 1, 40, 210)) is False
    assert pareto([_measured(1, 1, 5, 100), _measured(2, 1, 6, 90)]) == ["1x1@1"]


def test_the_deployment_config() -> None:
    data = {"configurations": TABLE, "complete": True, "threads_matter": True}
    config = _config(data, objective="throughput", cost={"price_per_hour": 2.88})
    assert (config.batch_size, config.instances, config.threads_per_instance) == (8, 4, 1)
    assert (config.p50_latency_ms, config.p99_latency_ms, config.throughput_qps) == (40, 48, 800)
    assert (config.cost_per_million, config.currency, config.memory_mb) == (1.0, "USD", 380)
    assert config.runtime == {"intra_op_num_threads": 1}
    assert config.dynamic_batching is True
    assert config.instances_per_gpu is None
    assert len(config.sweep) == len(TABLE)
    assert [c["id"] for c in config.sweep if c["pareto"]] == ["1x1@1", "4x1@1", "4x1@8", "4x1@32"]
    fixed = _config(data, objective="throughput", dynamic_batch=False)
    assert fixed.dynamic_batching is False
    assert fixed.cost_per_million is None
    relative = _config(data, objective="cost")
    assert relative.cost_per_million == pytest.approx(1e6 / 3600 / 800, rel=1e-5)
    assert "relative" in relative.reasons["cost_per_million"]
    gpu = _config({**data, "threads_matter": False})
    assert gpu.instances_per_gpu == 1
    nothing = _config(data, constraints={"p99_latency_ms": 1})
    assert "Relax constraints.p99_latency_ms to 7.5" in nothing.reasons["choice"]
    unswept = _config(None)
    assert unswept.runtime == {"x": 1}
    assert "not swept" in unswept.reasons["choice"]


@pytest.mark.parametrize(
    "cost", [{"price_per_hour": 0}, {"price_per_hour": -1}, {"price_per_hour": 1, "currency": "$"}]
)
def test_a_cost_that_is_none(cost: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cost"):
        OptimizationSpec.model_validate({"model_id": "m", "cost": cost})


def test_the_winner_is_measured_again_in_windows_that_it_was_not_chosen_by(swept: Callable[..., Any]) -> None:
    data = swept(layouts=[ONE, TWO], objective="throughput")
    again = {i: c["again"] for i, c in data["by_id"].items() if c["again"]}
    ((winner, found),) = again.items()
    assert found["windows"] >= 6
    assert found["throughput_qps"] > 0
    if found["reason"] is None:  # else the machine was busy, and there is no interval
        assert found["low"] < found["throughput_qps"] < found["high"]
    spec = OptimizationSpec(model_id="m", objective="throughput")
    config = deployment_config(
        data, picked_backend="onnxruntime", precision="fp32", runtime={}, dynamic_batch=True, spec=spec
    )
    assert f"{config.instances}x{config.threads_per_instance}@{config.batch_size}" == winner
    if found["reason"] is None:
        assert config.throughput_ci == [found["low"], found["high"]]
        assert config.throughput_qps == found["throughput_qps"]
    else:
        assert found["reason"] in config.reasons["throughput_qps"]
    hurried = swept(layouts=[ONE], seconds_left=1.0)
    reasons = [c["again"]["reason"] for c in hurried["configurations"] if c.get("again")]
    assert all("time left" in reason for reason in reasons)


def _driven(rate: float, waited: float = 0.0) -> Driven:
    return Driven(np.full(4, 1e9 / rate), rate, 0.1, Disturbance(0.1, 2, waited=waited))


def test_the_maximum_of_many_short_windows_flatters_and_fresh_ones_do_not() -> None:
    rng = np.random.default_rng(0)
    held = flattered = 0
    for _ in range(200):
        best = max(rng.normal(100, 5) for _ in range(20))
        found = winner.again(1, lambda: _driven(rng.normal(100, 5)), lambda: 60.0)
        held += found["low"] <= 100 <= found["high"]
        flattered += best > 103
    assert held >= 180
    assert flattered > 190


def test_windows_with_company_are_not_the_winners() -> None:
    rates = iter([(50.0, 0.09), (100.0, 0.0), (102.0, 0.0), (40.0, 0.09), *[(101.0, 0.0)] * 4])
    found = winner.again(2, lambda: _driven(*next(rates)), lambda: 60.0)
    assert (found["windows"], found["disturbed_windows"]) == (6, 2)
    assert 198 < found["low"] < found["throughput_qps"] < found["high"] < 206
    busy = winner.again(2, lambda: _driven(50.0, 0.09), lambda: 60.0)
    assert busy["low"] is None
    assert "undisturbed" in busy["reason"]
    assert throughput_of({"throughput_qps": 90.0, "again": busy})[:2] == (90.0, None)
