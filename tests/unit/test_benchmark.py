"""The benchmark stage on real models, with seeded regressions: a slowed engine, a broken one, one that dies."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app.domain.failures import FailureKind, StageFailure
from workers.candidates import Candidate, Case, Proposal
from workers.hardware import describe
from workers.kernel import Backend, BackendInfo, Reporter, Session, StageContext, TensorSpec, backends
from workers.measure import engine_child, engine_process, plan, rounds
from workers.measure.axes import fixed_batch
from workers.measure.engine_child import WarmUp
from workers.measure.engine_process import EngineProcess
from workers.measure.figures import a_a
from workers.measure.inputs import DISTINCT, rotating_feeds
from workers.stages.benchmark import Benchmark, BenchmarkOptions


class Spoiled(Session):
    """A real session with a fault: `how` is the runtime option of `TestSpoiled`."""

    def __init__(self, inner: Session, how: Mapping[str, Any]) -> None:
        self._inner, self._how, self._runs = inner, how, 0
        self.inputs, self.outputs = inner.inputs, inner.outputs

    def run(self, feeds: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self._how.get("sleep_s", 0.0))
        out = self._inner.run(feeds)
        if "nan_above" in self._how and max(float(a.max()) for a in feeds.values()) > self._how["nan_above"]:
            out = {n: np.full_like(a, np.nan) for n, a in out.items()}
        return out

    def call(self, feeds: dict[str, Any]) -> Callable[[], Any]:
        call = self._inner.call(feeds)

        def spoiled() -> None:
            self._runs += 1
            if "sleep_s" in self._how:
                time.sleep(self._how["sleep_s"])
            if self._runs == self._how.get("signal_after"):
                os.kill(os.getpid(), self._how["signal"])
            if self._runs == self._how.get("hang_after"):
                time.sleep(3600)
            if self._runs == self._how.get("raise_after"):
                raise MemoryError
            call()

        return spoiled

    def bind(self, feeds: dict[str, Any]) -> Callable[[], Any]:
        return self._inner.bind(feeds) if self._how.get("cheap_bind") else self.call(feeds)


class SpoiledBackend(Backend):
    name: ClassVar[str] = "test-spoiled"
    engine_format: ClassVar[str] = "onnx"

    def propose(self, case: Case) -> Proposal:
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> tuple[Candidate, ...]:
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return dict(runtime)

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        return None  # no worker offers it

    def build(self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        return Spoiled(backends()["onnxruntime"]().load(engine, {}), runtime)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return ""


class Notes(Reporter):
    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.notes: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.fractions.append(fraction)

    def note(self, message: str, **facts: Any) -> None:
        self.notes.append(message)


def mlp(folder: Path, *, width: int = 256, layers: int = 4, batch: int | str = "batch", reshape: int = 0) -> Path:
    """A small perceptron, 16 inputs to 4 outputs; with `reshape` it really takes only batches of that size."""
    rng = np.random.default_rng(0)
    nodes, weights, size, last = [], [], 16, "x"
    for i in range(layers):
        out = 4 if i == layers - 1 else width
        weights.append(numpy_helper.from_array((rng.standard_normal((size, out)) / 8).astype(np.float32), f"w{i}"))
        nodes += [
            helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]),
            helper.make_node("Tanh", [f"h{i}"], [f"a{i}"]),
        ]
        size, last = out, f"a{i}"
    if reshape:
        weights.append(numpy_helper.from_array(np.array([reshape, 4], np.int64), "shape"))
        nodes.append(helper.make_node("Reshape", [last, "shape"], ["fixed"]))
        last = "fixed"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        weights,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.fixture
def bench(tmp_path: Path) -> Callable[..., Any]:
    def run(
        engines: dict[str, Any],
        *,
        baseline: Path | None = None,
        data: Path | None = None,
        seconds_left: float | None = None,
        **options: Any,
    ) -> Any:
        folder = baseline or mlp(tmp_path / "model")
        inputs = {"baseline": folder, **{f"engine.{i}": e.pop("folder", folder) for i, e in engines.items()}}
        if data is not None:
            inputs["data"] = data
        reporter = Notes()
        soft = None if seconds_left is None else time.monotonic() + seconds_left
        ctx = StageContext(inputs, tmp_path, tmp_path / "out", reporter, describe(), soft)
        given = [{"id": i, "backend": "test-spoiled", **e} for i, e in engines.items()]
        result = Benchmark().run(
            ctx, BenchmarkOptions(**{"engines": given, "batch_sizes": [1], "min_seconds": 0.1, "rounds": 5, **options})
        )
        json.dumps(result.data, allow_nan=False)
        assert reporter.fractions == sorted(reporter.fractions)
        assert reporter.fractions[-1] == pytest.approx(1.0)
        return {**result.data, "reusable": result.reusable}

    return run


def test_every_figure_of_a_run(bench: Callable[..., Any], tmp_path: Path) -> None:
    small = mlp(tmp_path / "small", width=16)
    data = bench(
        {"same": {}, "small": {"folder": small}}, batch_sizes=[8, 1], min_seconds=0.2, rounds=10, want_p99=True
    )
    assert set(data["engines"]) == {"baseline", "same", "small"}
    assert data["batch_sizes"] == [1, 8]
    for name, engine in data["engines"].items():
        assert set(engine["batches"]) == {"1", "8"}
        assert engine["cold_start_ms"] == pytest.approx(engine["load_ms"] + engine["first_inference_ms"], rel=1e-4)
        assert 10 < engine["peak_memory_mb"] < 4000
        for batch, figures in engine["batches"].items():
            assert figures["samples"] >= 662
            assert figures["rounds"] >= 5
            assert 0 < figures["p50_ms"] <= figures["p90_ms"] <= figures["p95_ms"] <= figures["p99_ms"]
            assert figures["throughput_qps"] == pytest.approx(1000 * int(batch) / figures["mean_ms"], rel=1e-4)
            assert figures["not_finite"] == []
            for key in ("speedup", "throughput_ratio"):
                assert figures[key]["low"] <= figures[key]["ratio"] <= figures[key]["high"]
            expected = data["engines"]["baseline"]["batches"][batch]["p50_ms"] / figures["p50_ms"]
            assert figures["speedup"]["ratio"] == pytest.approx(expected, rel=0.5), name
    assert data["engines"]["small"]["size_bytes"] < data["engines"]["same"]["size_bytes"]
    assert set(data["aa"]) == {"1", "8"}
    assert data["noisy"] == bool(data["noise"]) == (not data["disturbance"]["claim"])
    assert data["reusable"] is not data["noisy"]
    for aa in data["aa"].values():  # what cannot be told from far more or less, or is too wide to say anything
        assert data["noisy"] or (aa["low"] <= 1.1 and aa["high"] >= 0.9 and aa["high"] <= 1.2 * aa["low"])
        assert aa["throughput"]["low"] <= aa["throughput"]["ratio"] <= aa["throughput"]["high"]
    told = data["disturbance"]
    assert told["clean_windows"] + told["dropped_windows"] >= 2 * 4 * 5
    assert (told["reason"] is None) == told["claim"]
    assert told["sources"]
    assert data["versions"]["onnxruntime"] == importlib.metadata.version("onnxruntime")
    assert "load_average" in data["conditions"]["before"]
    with np.load(tmp_path / "out/samples/samples.npz", allow_pickle=False) as raw:
        for name in ("baseline", "baseline (again)", "same", "small"):
            assert raw[f"{name}|1|latency_ns"].shape == raw[f"{name}|1|round"].shape
        small = data["engines"]["small"]["batches"]["8"]
        counts = ~np.isin(raw["small|8|round"], raw["small|8|disturbed"])
        assert small["disturbed_rounds"] == len(raw["small|8|disturbed"])
        assert small["samples"] in (counts.sum(), len(counts))  # all, where too few count


def test_noise_is_known_of_medians_and_of_means() -> None:
    """Two processes with the same median, of which one stalls now and then: only the throughput tells them apart."""
    steady = [np.full(100, 1_000_000) for _ in range(10)]
    stalls = [np.where(np.arange(100) < 10, 9_000_000, 1_000_000) for _ in range(10)]
    a, b = (rounds.Timing(WarmUp(50, 1.0, True, 1e6), [], list(x)) for x in (steady, stalls))
    found = a_a(a, b, 0).to_json()
    assert found["ratio"] == found["low"] == found["high"] == 1
    assert found["throughput"]["ratio"] == pytest.approx(1 / 1.8, rel=1e-4)
    assert found["throughput"]["high"] < 1


def test_memory_is_in_decimal_megabytes(tmp_path: Path) -> None:
    process = EngineProcess("x", "onnxruntime", mlp(tmp_path / "m"), {})
    process.load()
    status = Path(f"/proc/{process.pid}/status").read_text()
    kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
    assert process.peak_memory_mb() == pytest.approx(kib * 1024 / 1e6, rel=0.02)
    process.close()


def test_a_slowed_engine_never_looks_faster(bench: Callable[..., Any]) -> None:
    data = bench({"slow": {"runtime": {"sleep_s": 0.001}}})
    speedup = data["engines"]["slow"]["batches"]["1"]["speedup"]
    assert speedup["high"] < 1
    assert data["engines"]["slow"]["batches"]["1"]["throughput_ratio"]["high"] < 1


def test_what_a_user_calls_decides_and_the_bound_call_stands_beside(bench: Callable[..., Any], tmp_path: Path) -> None:
    """An engine that is fast only for who binds its tensors is slow to a user of `infer.py`."""
    data = bench({"slow": {"runtime": {"sleep_s": 0.002, "cheap_bind": True}}})
    slow, baseline = (data["engines"][i]["batches"]["1"] for i in ("slow", "baseline"))
    assert slow["speedup"]["high"] < 0.5
    assert slow["p50_ms"] > 2 > slow["bound"]["p50_ms"]
    gain = slow["bound"]["speedup"]  # None where other work on the machine disturbed too many of the few windows
    assert gain is None or gain["high"] > 0.5
    assert baseline["bound"]["speedup"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert slow["bound"]["samples"] >= 11
    assert "infer.py" in data["method"]["call"]
    with np.load(tmp_path / "out/samples/samples.npz", allow_pickle=False) as raw:
        assert len(raw["slow|1|bound_ns"]) >= slow["bound"]["samples"]
    assert "bound" not in bench({"a": {}}, screening=True)["engines"]["a"]["batches"]["1"]


def test_a_faster_engine_is_seen(bench: Callable[..., Any], tmp_path: Path) -> None:
    big = mlp(tmp_path / "big", width=1024)
    data = bench({"small": {"backend": "onnxruntime", "folder": mlp(tmp_path / "small", width=8)}}, baseline=big)
    assert data["engines"]["small"]["batches"]["1"]["speedup"]["low"] > 1.5


@pytest.mark.parametrize(
    ("runtime", "code"),
    [
        ({"signal_after": 40, "signal": int(signal.SIGSEGV)}, "engine_crashed"),
        ({"signal_after": 40, "signal": int(signal.SIGKILL)}, "out_of_memory"),
        ({"raise_after": 40}, "out_of_memory"),
    ],
)
def test_an_engine_that_dies_leaves_the_others_alone(
    bench: Callable[..., Any], runtime: dict[str, Any], code: str
) -> None:
    data = bench({"dies": {"runtime": runtime}, "lives": {}})
    assert data["engines"]["dies"]["failed"]["code"] == code
    assert data["engines"]["dies"]["batches"] == {}
    assert "failed" not in data["engines"]["lives"]
    assert data["engines"]["lives"]["batches"]["1"]["samples"] > 11
    if code == "out_of_memory":  # it may live another time: no other job may take this for an answer
        assert data["reusable"] is False
    else:
        assert data["reusable"] is not data["noisy"]


def test_an_engine_that_hangs_is_ended(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "INFERENCE_LIMIT_S", 1.0)
    data = bench({"hangs": {"runtime": {"hang_after": 10}}, "lives": {}})
    assert data["engines"]["hangs"]["failed"]["code"] == "engine_timeout"
    assert data["engines"]["lives"]["batches"]["1"]["p50_ms"] > 0


def test_engines_that_cannot_start(bench: Callable[..., Any], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.onnx").write_bytes(b"not a model")
    data = bench({"broken": {"folder": broken}, "nobody": {"backend": "no-such-backend"}})
    assert data["engines"]["broken"]["failed"]["stage"] == "benchmark"
    assert data["engines"]["nobody"]["failed"]["code"] == "backend_unavailable"
    with pytest.raises(StageFailure, match="original model"):
        bench({}, baseline=broken)


def test_outputs_that_are_not_finite_are_flagged(bench: Callable[..., Any]) -> None:
    data = bench({"nan": {"runtime": {"nan_above": 2.4}}})
    assert data["engines"]["nan"]["batches"]["1"]["not_finite"] == ["y"]
    assert data["engines"]["baseline"]["batches"]["1"]["not_finite"] == []


def test_only_batch_sizes_that_the_model_takes(bench: Callable[..., Any], tmp_path: Path) -> None:
    data = bench({}, baseline=mlp(tmp_path / "fixed", batch=2), batch_sizes=[1, 2, 8])
    assert data["batch_sizes"] == [2]
    assert set(data["skipped_batches"]) == {"1", "8"}
    data = bench({}, baseline=mlp(tmp_path / "lies", reshape=1), batch_sizes=[1, 8])
    assert data["batch_sizes"] == [1]
    assert "fails" in data["skipped_batches"]["8"]


def test_few_samples_give_no_percentile(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "P99_CAP_S", 1.0)
    data = bench({"slow": {"runtime": {"sleep_s": 0.03}}}, want_p99=True)
    figures = data["engines"]["slow"]["batches"]["1"]
    assert 11 <= figures["samples"] < 64
    assert figures["p50_ms"] > 30
    assert figures["p90_ms"] is None
    assert figures["p99_ms"] is None
    assert "662" in figures["reasons"]["p99_ms"]
    assert "more than 1 s" in figures["reasons"]["p99_ms"]
    assert data["engines"]["baseline"]["batches"]["1"]["p99_ms"] is not None  # that one was affordable


def test_inputs_come_from_the_data_set(bench: Callable[..., Any], tmp_path: Path) -> None:
    x = np.zeros((20, 16), np.float32)
    x[:, 0] = np.arange(20)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "d.npz", x=x, labels=np.arange(20))
    data = bench({"nan": {"runtime": {"nan_above": 10}}}, data=tmp_path / "data", batch_sizes=[2])
    assert "20 samples" in data["method"]["inputs"] or "16 samples" in data["method"]["inputs"]
    assert data["engines"]["nan"]["batches"]["2"]["not_finite"] == ["y"]
    np.savez(tmp_path / "data" / "d.npz", x=x[:, :3])
    with pytest.raises(StageFailure) as caught:
        bench({}, data=tmp_path / "data")
    assert caught.value.kind is FailureKind.DATA


def test_inputs_are_distinct_at_every_batch_size() -> None:
    spec = (TensorSpec("x", "float32", ("batch", 16)),)
    feeds, _ = rotating_feeds(spec, [1, 7, 8, 64], None, None, 0)
    for batch, inputs in feeds.items():
        assert len({f["x"].tobytes() for f in inputs}) == DISTINCT
        assert all(f["x"].shape == (batch, 16) for f in inputs)
    wide = (TensorSpec("x", "float32", ("batch", 1 << 16)),)
    (views,) = rotating_feeds(wide, [128], None, None, 0)[0].values()
    assert len({f["x"][:1].tobytes() for f in views}) == DISTINCT
    assert all(f["x"].base is views[0]["x"].base for f in views)


def test_a_window_of_a_tiny_model_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_child, "MAX_WINDOW_SAMPLES", 50)
    x = np.ones((1, 16), np.float32)
    process = EngineProcess("x", "onnxruntime", mlp(tmp_path / "m", width=8), {}, {1: [{"x": x}]})
    process.load()
    process.prepare(1)
    assert len(process.window(30, 1, 1e4).latencies) == 50
    assert len(process.window(30, 60, 1e4).latencies) == 60
    process.close()


def test_fixed_batch() -> None:
    assert fixed_batch([TensorSpec("x", "float32", (4, 3))]) == 4
    assert fixed_batch([TensorSpec("x", "float32", ("n", 3)), TensorSpec("s", "float32", (1,))]) is None
    assert fixed_batch([TensorSpec("scalar", "float32", ())]) is None


def test_how_long_is_measured() -> None:
    fast = plan.plan_rounds({"a": 1e5, "b": 2e5}, min_seconds=3, rounds=10, want_p99=True)
    assert (fast.rounds, fast.seconds) == (10, 0.3)
    assert all(n * 10 >= 662 for n in fast.iterations.values())
    slow = plan.plan_rounds({"a": 2e9, "b": 1e5}, min_seconds=3, rounds=10, want_p99=True)
    assert 5 <= slow.rounds <= 6
    assert slow.iterations["a"] * slow.rounds >= 11
    assert set(slow.refused) == {"a"}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12+, in a process with threads
def test_no_process_is_left(tmp_path: Path) -> None:
    process = EngineProcess("x", "onnxruntime", mlp(tmp_path / "m"), {})
    pid = process.pid
    assert process.load().inputs[0].name == "x"
    process.close()
    process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(StageFailure, match="ended before"):
        process.load()
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:  # a stage that is killed takes its engines with it
        child = EngineProcess("x", "onnxruntime", tmp_path / "m", {})
        child.load()
        os.write(write, str(child.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    grandchild = int(os.read(read, 32))
    os.close(read)
    os.close(write)
    for _ in range(100):
        try:
            if Path(f"/proc/{grandchild}/stat").read_text().split(")")[1].split()[0] == "Z":
                break
        except FileNotFoundError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the engine's process outlived its stage")


@pytest.mark.parametrize(
    "engines",
    [[{"id": "a", "backend": "x"}] * 2, [{"id": "baseline", "backend": "x"}], [{"id": "../x", "backend": "x"}]],
)
def test_engine_ids(engines: list[dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="engine"):
        BenchmarkOptions(engines=engines)


def test_a_screening_is_short_and_shows_no_tails(bench: Callable[..., Any]) -> None:
    start = time.monotonic()
    engines: dict[str, Any] = {f"e{i}": {} for i in range(3)}
    engines["slow"] = {"runtime": {"sleep_s": 0.2}}
    data = bench(engines, screening=True, cold=False, rounds=5, batch_sizes=[1, 8], want_p99=True)
    assert time.monotonic() - start < 60
    assert data["screening"] is True
    for engine in data["engines"].values():
        assert engine["cold_start_ms"] is engine["peak_memory_mb"] is None
        assert "not asked for" in engine["reasons"]["peak_memory_mb"]
        for figures in engine["batches"].values():
            assert figures["samples"] >= 5
            assert figures["p90_ms"] is figures["p99_ms"] is None
            assert "screening" in figures["reasons"]["p99_ms"]
            assert figures["speedup"]["low"] <= figures["speedup"]["ratio"]
    slow = data["engines"]["slow"]["batches"]["1"]
    assert slow["samples"] < 11
    assert slow["p50_ms"] is None  # eleven are needed
    assert slow["mean_ms"] > 200
    assert slow["speedup"]["high"] < 1
    assert "screening" in data["method"]
    assert data["noisy"] is data["disturbance"]["claim"] is False
    assert data["reusable"] is True


def test_without_cold_starts_batches_that_the_model_refuses_are_still_known(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    data = bench({"same": {}}, baseline=mlp(tmp_path / "lies", reshape=1), batch_sizes=[1, 8], cold=False)
    assert data["batch_sizes"] == [1]
    assert "fails" in data["skipped_batches"]["8"]
    assert data["engines"]["same"]["batches"]["1"]["p50_ms"] > 0


def test_a_screening_in_a_hurry_is_content_with_the_batch_size_that_counts(bench: Callable[..., Any]) -> None:
    engines = {i: {"runtime": {"sleep_s": 0.02}} for i in "abc"}
    asked = {"screening": True, "cold": False, "batch_sizes": [1, 8]}
    asked |= {"baseline_backend": "test-spoiled", "baseline_runtime": {"sleep_s": 0.02}}
    hurried = bench(engines, essential=1, seconds_left=8, **asked)
    assert hurried["batch_sizes"] == [1]
    assert "time left" in hurried["skipped_batches"]["8"]
    assert hurried["shortened"] is True
    assert all("failed" not in e and list(e["batches"]) == ["1"] for e in hurried["engines"].values())
    assert bench(engines, essential=1, **asked)["batch_sizes"] == [1, 8]
    assert bench(engines, essential=4, seconds_left=8, **asked)["batch_sizes"] == [1, 8]


def test_a_soft_deadline_shortens_and_then_leaves_out_the_last(bench: Callable[..., Any]) -> None:
    slow = {"runtime": {"sleep_s": 0.05}}
    short = bench({"a": dict(slow)}, min_seconds=30, seconds_left=4)
    assert short["shortened"] is True
    assert short["reusable"] is False
    assert "failed" not in short["engines"]["a"]
    assert all(e["batches"]["1"]["rounds"] >= 5 for e in short["engines"].values())
    crowd = bench({i: {"runtime": {"sleep_s": 0.2}} for i in "abcdefgh"}, min_seconds=30, seconds_left=4)
    left_out = [i for i, e in crowd["engines"].items() if "failed" in e]
    assert left_out
    assert left_out == [*"abcdefgh"][-len(left_out) :]
    failed = crowd["engines"]["h"]["failed"]
    assert (failed["code"], failed["kind"], failed["cacheable"]) == ("budget_exhausted", "request", False)
    nothing = bench({"a": {}}, seconds_left=-5)  # the baseline is measured whatever the time
    assert nothing["engines"]["a"]["failed"]["code"] == "budget_exhausted"
    assert nothing["engines"]["baseline"]["batches"]["1"]["samples"] >= 5
    assert nothing["reusable"] is False


def test_engines_compared_with_one_of_them(bench: Callable[..., Any], tmp_path: Path) -> None:
    engines = {"ref": {"runtime": {"sleep_s": 0.002}}, "slower": {"runtime": {"sleep_s": 0.008}}, "same": {}}
    data = bench(engines, compare_to="ref")
    at = {i: e["batches"]["1"]["against"] for i, e in data["engines"].items()}
    assert {a["id"] for a in at.values()} == {"ref"}
    assert at["ref"]["speedup"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    assert at["slower"]["speedup"]["low"] <= at["slower"]["speedup"]["ratio"] <= at["slower"]["speedup"]["high"] < 1
    assert at["same"]["throughput_ratio"]["ratio"] > 1
    assert data["aa_compared"]["1"]["low"] <= data["aa_compared"]["1"]["ratio"]
    data = bench({"ref": {"runtime": {"raise_after": 40}}, "lives": {}}, compare_to="ref")
    assert "failed" in data["engines"]["ref"]
    assert "against" not in data["engines"]["lives"]["batches"]["1"]
    with pytest.raises(ValueError, match="compare_to"):
        BenchmarkOptions(engines=[{"id": "a", "backend": "x"}], compare_to="b")


def test_a_plan_shrinks_to_the_time_left() -> None:
    p50 = {"a": 1e6, "b": 4e6}
    wanted = plan.plan_rounds(p50, min_seconds=3, rounds=10, want_p99=True)
    assert plan.shrink(wanted, p50, 100) is wanted
    for seconds in (5, 2, 1, 0.7):
        assert plan.plan_seconds(plan.shrink(wanted, p50, seconds), p50) <= seconds
    least = plan.shrink(wanted, p50, 0)
    assert (least.rounds, least.seconds, set(least.iterations.values())) == (5, 0.0, {1})
    assert set(least.refused) == {"a", "b"}


def test_how_long_a_benchmark_is_expected_to_take() -> None:
    small = {f"e{i}": {1: 0.05, 8: 0.2} for i in range(8)} | {"baseline": {1: 0.1, 8: 0.4}}
    short = plan.expected_seconds(small, min_seconds=0.2, rounds=5, screening=True, cold=False)
    assert 5 < short < 20
    full = plan.expected_seconds(small, min_seconds=3)
    assert full > 60  # ten processes, two batch sizes, three seconds each
    unknown = {i: dict.fromkeys(at) for i, at in small.items()}
    assert plan.expected_seconds(unknown, min_seconds=3) <= full
    slow = {"baseline": {1: 1000.0}}
    assert plan.expected_seconds(slow, min_seconds=3) > 2 * 11
    assert plan.expected_seconds(slow, min_seconds=0.2, screening=True, cold=False) < 2 * 11
