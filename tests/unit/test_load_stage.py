"""The stage that puts a bundle under a job's traffic: a real model, the batcher that ships, processes of its own."""

from __future__ import annotations

import asyncio
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from onnx import helper, numpy_helper

from app.domain.failures import StageFailure
from app.domain.traffic import Traffic
from tests.factories import onnx_models
from tests.factories.bundles import bundle
from workers.hardware import describe
from workers.kernel import StageContext, TensorSpec
from workers.measure.instances import memory_bytes
from workers.measure.load.arrivals import Arrivals
from workers.measure.load.bench import Bench, Clock, Limit, Setup, opened
from workers.measure.load.mix import Kind, Mix, mix_of
from workers.measure.load.over_http import launch_server
from workers.measure.load.padding import buckets_of
from workers.measure.load.target import FAILED, OK
from workers.pipeline.child import PipeReporter
from workers.serving.batcher import Settings
from workers.stages.load_test import LoadTest, LoadTestOptions

INPUTS = [TensorSpec("ids", "int64", ("batch", "sequence"))]
OUTPUTS = [TensorSpec("out", "float32", ("batch", 8))]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def run(seconds: float = 15.0, model: Any = None, accepts: Any = None, **traffic: Any) -> dict[str, Any]:
        model = model or onnx_models.mlp(features=32, hidden=64)
        shipped = bundle(model, tmp_path / "made", accepts)
        inputs = {"bundle": shipped, "original": tmp_path / "made" / "engine"}
        ctx = StageContext(
            inputs, tmp_path / "work", tmp_path / "out", PipeReporter(None), describe(), time.monotonic() + seconds
        )
        told = {"slo": {"p99_latency_ms": 500}, "rate_per_second": 40, **traffic}
        options = LoadTestOptions(traffic=told, backend="onnxruntime", baseline_backend="onnxruntime")
        result = LoadTest().run(ctx, options)
        json.dumps(result.data, allow_nan=False)
        return dict(result.data)

    return run


def test_a_bundle_and_the_original_under_traffic(load: Callable[..., dict[str, Any]]) -> None:
    data = load()
    engine, original = data["engine"], data["original"]
    assert engine["alone_p50_ms"] > 0
    assert engine["goodput"]["rate"] or engine["goodput"]["reason"]  # on a machine that has other work, nothing is said
    assert engine["start_seconds"] > 0
    assert engine["memory_mb"] > 10
    assert original is None or original["setup"] == {
        "instances": 1,
        "threads": None,
        "max_batch": 1,
        "max_delay_ms": 0.0,
        "padded": False,
        "preferred": [],
    }
    settings = Settings.from_json(data["serving"]["settings"])
    assert settings.instances == engine["setup"]["instances"]
    assert settings.max_batch == engine["setup"]["max_batch"]
    assert all(t["decision"] for t in data["tried"])
    seen = [p for p in engine["curve"] if p["requests"]]
    assert seen or "time ran out" in engine["goodput"]["reason"], engine
    assert all(sum(p["ended"].values()) == p["requests"] for p in seen)
    assert not seen or any(p["batches"] for p in seen)
    assert (data["http"] is None) == ("http" in data["reasons"])
    assert data["http"] is None or data["http"]["setup"] == engine["setup"]
    assert data["traffic"]["rate_per_second"] == 40
    assert data["traffic"]["requests"][0]["share"] == 1.0
    assert data["generator"]["cpu_us_per_request"] > 0
    assert data["complete"] == (not data["reasons"] and data["complete"])


def test_the_server_in_the_bundle_is_driven_over_http(tmp_path: Path) -> None:
    model = onnx_models.mlp(features=8)
    with zipfile.ZipFile(bundle(model, tmp_path / "made") / "m-bundle.zip") as packed:
        packed.extractall(tmp_path / "served")
    feeds = {"input": np.ones((2, 8), dtype=np.float32)}
    mix = Mix([Kind("typical × 2", 2, {"input": (2, 8)}, 1.0, [feeds])], "")
    limit = Limit(10.0, 20.0)
    launch = launch_server(tmp_path / "served", Settings(batch_axis={"input": 0}))

    async def run() -> tuple[Any, Any, Any]:
        bench = Bench(launch, mix, Arrivals(poisson=False), limit, Clock())
        async with opened(bench):
            target = await bench.target(Setup(max_batch=4))
            assert (await target.submit({"input": np.ones((2, 3), dtype=np.float32)}, 20.0)).status == FAILED
            (server,) = [p for p in psutil.Process().children() if "serve.py" in " ".join(p.cmdline())]
            memory = (target.memory_mb(), memory_bytes(server.pid) / 1e6)
            found = (
                await bench.alone(Setup(max_batch=4)),
                await bench.point(Setup(max_batch=4), 100.0, proven=False, requests=40),
                memory,
            )
            server.kill()
            server.wait(30)
        assert bench.memory == {Setup(max_batch=4): None}, "a server that is dead loses nothing of what was measured"
        return found

    alone, point, (memory, without_instances) = asyncio.run(run())
    assert alone.ended(OK) == alone.count > 0
    assert point.figures["ended"] == {"ok": point.count, "rejected": 0, "timed_out": 0, "failed": 0}
    assert memory > without_instances + 5


def test_a_limit_that_nobody_keeps_is_told_with_the_nearest(load: Callable[..., dict[str, Any]]) -> None:
    data = load(40.0, slo={"p99_latency_ms": 0.001})
    assert data["engine"]["goodput"]["rate"] == 0
    assert "the nearest limit that can be kept is about" in data["engine"]["goodput"]["reason"]
    assert data["original"]["goodput"]["rate"] == 0
    assert data["served"] is None
    assert data["engine"]["setup"]["max_batch"] == 1


def test_traffic_outside_of_what_the_engine_takes_is_named(load: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(StageFailure) as failed:
        load(model=onnx_models.mlp(features=32), accepts={"input": [[1, 4], None]}, batch_mix={8: 1.0})
    assert failed.value.code == "traffic_outside_engine"
    assert "size 8 on axis 0" in failed.value.detail
    assert "takes 1 to 4" in failed.value.detail


def sentence(heeds: bool) -> Any:
    """The mean of a sentence's tokens: of those that its mask names, or (without `heeds`) of all."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["tokens"])]
    nodes += [helper.make_node("Unsqueeze", ["mask", "last"], ["wide"])]
    nodes += [helper.make_node("Mul", ["tokens", "wide"], ["counted"])]
    nodes += [helper.make_node("ReduceSum", ["counted", "one"], ["total"], keepdims=0)]
    nodes += [helper.make_node("ReduceSum", ["mask", "one"], ["length"], keepdims=1)]
    nodes += [helper.make_node("Div", ["total", "length"], ["mean"])] if heeds else []
    nodes += [] if heeds else [helper.make_node("ReduceMean", ["counted"], ["mean"], axes=[1], keepdims=0)]
    table = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    constants = [onnx_models.tensor("table", table), *(numpy_helper.from_array(np.array([a]), n) for n, a in AXES)]
    inputs = [onnx_models.value(n, ["batch", "time"], t) for n, t in (("ids", 7), ("mask", 1))]
    return onnx_models.make_model(nodes, inputs, [onnx_models.value("mean", ["batch", 8])], constants)


AXES = (("last", 2), ("one", 1))
LENGTHS = [{"dims": {"ids": [1, n], "mask": [1, n]}, "share": 0.2} for n in (4, 6, 8, 12, 16)]


def test_requests_of_unlike_lengths_are_filled_up_where_the_answers_stay(load: Callable[..., dict[str, Any]]) -> None:
    data = load(model=sentence(heeds=True), shape_mix=LENGTHS)
    assert data["padding"] == {"sizes": {n: {"1": [6, 8, 12, 16]} for n in ("ids", "mask")}, "refused": {}}
    tried = [t for t in data["tried"] if t["padded"]]
    assert tried
    assert all(t["decision"] for t in tried)
    settings = Settings.from_json(data["serving"]["settings"])
    assert bool(settings.pad) == data["engine"]["setup"]["padded"]


def test_a_model_that_looks_at_the_whole_sentence_is_not_filled_up(load: Callable[..., dict[str, Any]]) -> None:
    data = load(6.0, model=sentence(heeds=False), shape_mix=LENGTHS)
    assert data["padding"]["sizes"] == {}
    assert "output mean changes when it is filled up" in data["padding"]["refused"]["ids"]
    assert not any(t["padded"] for t in data["tried"])


def of_sizes(*sizes: tuple[tuple[int, int], float]) -> Mix:
    kinds = [
        Kind(str(n), 1, {"image": (1, 3, *size)}, share, [{"image": np.zeros((1, 3, *size), np.float32)}])
        for n, (size, share) in enumerate(sizes)
    ]
    return Mix(kinds, "")


def test_the_sizes_to_fill_up_to_follow_the_requests() -> None:
    assert buckets_of(of_sizes(((8, 8), 1.0)), ["image"]) == {}
    two = of_sizes(((8, 12), 0.7), ((16, 16), 0.3))
    assert buckets_of(two, ["image"]) == {"image": {2: (8, 16), 3: (12, 16)}}
    assert buckets_of(two, []) == {}, "it is the same for all samples of a batch"
    many = of_sizes(*(((n, 8), 0.1) for n in range(1, 11)))
    assert buckets_of(many, ["image"]) == {"image": {2: (3, 5, 8, 10)}}
    rare = of_sizes(((8, 8), 0.98), ((64, 8), 0.02))
    assert buckets_of(rare, ["image"]) == {"image": {2: (8, 64)}}


def traffic(**told: Any) -> Traffic:
    return Traffic.model_validate({"slo": {"p99_latency_ms": 20}, **told})


def mix(told: Traffic, data: Path | None = None) -> Any:
    return mix_of(told, INPUTS, OUTPUTS, data=data, ranges=None, accepts={}, seed=0)


def test_batches_and_shapes_are_mixed_by_their_shares() -> None:
    shapes = [{"dims": {"ids": [1, 8]}, "share": 0.75}, {"dims": {"ids": [1, 64]}, "share": 0.25}]
    found = mix(traffic(batch_mix={"1": 0.5, "4": 0.5}, shape_mix=shapes))
    assert {k.feeds[0]["ids"].shape: round(k.share, 4) for k in found.kinds} == {
        (1, 8): 0.375,
        (1, 64): 0.125,
        (4, 8): 0.375,
        (4, 64): 0.125,
    }
    assert found.samples == 2.5


def test_shapes_come_in_the_shares_of_the_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, length, count in (("a", 8, 30), ("b", 16, 10)):
        np.savez(folder / f"{name}.npz", ids=np.ones((count, length), dtype=np.int64))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, path.name)
    found = mix(traffic(), tmp_path / "set.zip")
    assert {k.feeds[0]["ids"].shape: k.share for k in found.kinds} == {(1, 8): 0.75, (1, 16): 0.25}
    assert "in the shares of the data set" in found.words
