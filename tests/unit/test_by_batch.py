"""Several engines in one bundle, chosen by the batch size: loaded, timed and packed as one; each answers its own."""

from __future__ import annotations

import asyncio
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from app.blobs.content import sha256_file
from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.failures import StageFailure
from tests.factories import onnx_models as models
from tests.unit.test_bundle import Notes, infer, loaded
from workers.artifacts import names_in
from workers.backends.bundle_script import HURRY
from workers.hardware import describe
from workers.kernel import Session, StageContext, backends
from workers.measure.benchmark_options import EngineOption
from workers.measure.pieces import folder_digest
from workers.members import names_of
from workers.pipeline.workspace import Workspace
from workers.serving.batcher import Batcher, Settings
from workers.serving.proof import run_bundle
from workers.stages.benchmark import Benchmark, BenchmarkOptions
from workers.stages.package import Package, PackageOptions

MOST = 3


def side_by_side(
    folder: Path, engines: dict[str, tuple[str, ModelProto]], most: int = MOST
) -> tuple[Path, dict[str, Any]]:
    """The engines, built by their backends (name → backend and model), in a folder each; and how they are loaded."""
    told = []
    for index, (name, (backend, model)) in enumerate(engines.items()):
        out = folder / "engine" / name
        out.mkdir(parents=True)
        built = backends()[backend]().build(models.folder(model, folder / f"model-{name}"), out, {}, Notes())
        last = index == len(engines) - 1
        told.append({"folder": name, "backend": backend, "runtime": built["runtime"], "most": None if last else most})
    return folder / "engine", {"input": "input", "axis": 0, "engines": told}


def apart() -> dict[str, tuple[str, ModelProto]]:
    """Two models that tell who answered, on two libraries."""
    return {"small": ("onnxruntime", models.mlp(seed=1)), "large": ("openvino", models.mlp(seed=2))}


def rows(count: int) -> dict[str, Any]:
    return {"input": np.random.default_rng(count).normal(size=(count, 8)).astype(np.float32)}


def alone(folder: Path, runtime: dict[str, Any]) -> list[Session]:
    return [backends()[e["backend"]]().load(folder / e["folder"], e["runtime"]) for e in runtime["engines"]]


def test_a_call_goes_to_the_engine_of_its_batch_size(tmp_path: Path) -> None:
    engine, runtime = side_by_side(tmp_path, apart())
    both, (small, large) = backends()["by-batch"]().load(engine, runtime), alone(engine, runtime)
    for count in (1, MOST, MOST + 1, 20):
        wanted = (small if count <= MOST else large).run(rows(count))["logits"]
        other = (large if count <= MOST else small).run(rows(count))["logits"]
        for found in (both.run(rows(count)), both.call(rows(count))(), both.bind(rows(count))()):
            if isinstance(found, dict):  # a bound call leaves its outputs where they are
                np.testing.assert_array_equal(found["logits"], wanted)
                assert not np.allclose(found["logits"], other)
    assert [s.name for s in both.inputs] == ["input"]
    both.close()


def test_one_that_cannot_be_loaded_is_told_by_its_own_backend(tmp_path: Path) -> None:
    engine, runtime = side_by_side(tmp_path, apart())
    (engine / "large" / "model.xml").write_text("no model")
    with pytest.raises(StageFailure, match="load_failed"):
        backends()["by-batch"]().load(engine, runtime)
    runtime["engines"][1]["backend"] = "nobody"
    with pytest.raises(StageFailure, match="no backend 'nobody'"):
        backends()["by-batch"]().load(engine, runtime)
    with pytest.raises(StageFailure, match="not valid"):
        backends()["by-batch"]().load(engine, {**runtime, "axis": -1})


def test_its_threads_and_its_libraries_are_those_of_its_engines(tmp_path: Path) -> None:
    _, runtime = side_by_side(tmp_path, apart())
    small, large = backends()["by-batch"]().with_threads(runtime, 3)["engines"]
    assert (small["runtime"]["intra_op_num_threads"], large["runtime"]["inference_num_threads"]) == (3, 3)
    assert names_of("by-batch", runtime) == ("by-batch", "onnxruntime", "openvino")
    assert names_of("openvino", {}) == ("openvino",)
    assert backends()["by-batch"]().probe(describe()) is None, "no job asks for it"


def test_an_artifact_of_several_engines_is_stored_file_by_file(tmp_path: Path) -> None:
    """Its files are those that were judged, under the names of their folders."""
    engine, _ = side_by_side(tmp_path, apart())

    class Store:
        def fetch(self, _: str, sha256: str, target: Path) -> None:
            target.write_bytes(next(p for p in engine.rglob("*.*") if sha256_file(p) == sha256).read_bytes())

    names = names_in(engine)
    assert "small/model.onnx" in names
    assert "large/model.bin" in names
    ref = ArtifactRef(tuple(FileRef(n, sha256_file(engine / n), (engine / n).stat().st_size) for n in names))
    there = Workspace(tmp_path / "jobs", "tenant", Store()).fetch(ref)  # type: ignore[arg-type]  # what is asked of it
    assert names_in(there) == names
    assert folder_digest(there) == ref.digest == folder_digest(engine)


def packaged(folder: Path, engine: Path, runtime: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The unpacked bundle, by the stage itself; and the stage's data."""
    (folder / "work").mkdir()
    context = StageContext({"engine": engine}, folder / "work", folder / "out", Notes(), describe())
    options = PackageOptions(
        name="m-fp32",
        backend="by-batch",
        runtime=runtime,
        engine_format="engines-by-batch",
        manifest={"job": {"id": "job_1"}, "engine": {"precision": "int8+fp32"}},
        engine_digest=folder_digest(engine),
    )
    data = dict(Package().run(context, options).data)
    with zipfile.ZipFile(folder / "out/bundle" / data["bundle_file"]) as archive:
        archive.extractall(folder / "bundle")
    return folder / "bundle", data


def test_a_server_s_batches_go_to_either_and_the_original_may_be_one(tmp_path: Path) -> None:
    """The batcher takes the bundle for one engine."""
    engine, runtime = side_by_side(tmp_path, apart())
    shutil.rmtree(engine / "large")
    shutil.copytree(tmp_path / "model-large", engine / "large")
    runtime["engines"][1] |= {"backend": "onnxruntime", "runtime": {}}  # as the baseline is loaded
    bundle, _ = packaged(tmp_path, engine, runtime)
    small, large = alone(engine, runtime)

    async def serve() -> None:
        batcher = Batcher(bundle, Settings(instances=1, max_batch=16))
        await batcher.start()
        try:
            for count in (1, MOST, MOST + 1, 9):
                wanted = (small if count <= MOST else large).run(rows(count))["logits"]
                found = await batcher.enqueue(rows(count), 30.0)
                np.testing.assert_array_equal(found["logits"], wanted)
        finally:
            await batcher.stop(grace_s=1.0)

    asyncio.run(serve())


def test_the_bundle_runs_both_and_tells_a_difference_of_either(tmp_path: Path) -> None:
    engine, runtime = side_by_side(tmp_path, apart())
    bundle, data = packaged(tmp_path, engine, runtime)
    assert {"small/infer.py", "large/infer.py", "sample_input_large.npz"} <= set(names_in(bundle))
    assert data["engine_file"] == "m-fp32.tar"
    triton = json.loads((bundle / "kinds.json").read_text())["triton"]
    assert (triton["backend"], triton["files"]["m-fp32/1/small/infer.py"]) == ("python", "small/infer.py")
    assert "two engines" in triton["notes"][0]
    required = [line.split("==")[0] for line in (bundle / "requirements.txt").read_text().splitlines()]
    assert required == ["httptools", "numpy", "onnxruntime", "openvino", "orjson", "uvloop"]

    same = infer(bundle, "--repeat", "1")
    assert same.returncode == 0, same.stderr
    assert same.stdout.count("the same as where it was built") == 2, "one sample for each engine"
    run, (small, large) = loaded(bundle), alone(engine, runtime)
    for count, session in ((MOST, small), (MOST + 1, large)):
        np.testing.assert_array_equal(run(rows(count))["logits"], session.run(rows(count))["logits"])

    answers = [(rows(n), session.run(rows(n))) for n, session in ((1, small), (MOST + 1, large))]
    answers[1][1]["logits"] += 1
    with pytest.raises(StageFailure, match=r"serve\.py of the bundle.* answered otherwise"):
        run_bundle(bundle, "m-fp32", answers, 1e-2, at_once=True, arguments=HURRY)

    with np.load(bundle / "sample_input_large.npz") as sample:
        assert len(sample["input"]) == MOST + 1
    with np.load(bundle / "expected_output_large.npz") as expected:
        np.savez(bundle / "expected_output_large.npz", logits=expected["logits"] + 1)
    assert infer(bundle, "--repeat", "1").returncode == 1


def slow_beyond(rounds: int, fixed: int) -> ModelProto:
    """y = x w, by work of no use beside it: `rounds` products of 32 by 32 for every sample, and `fixed` in all."""
    w, big = models._rng().normal(size=(8, 4)).astype(np.float32), np.eye(32, dtype=np.float32)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["on"], ["on_out"]),
            helper.make_node("MatMul", ["before", "big"], ["after"]),
        ],
        "body",
        [
            models.value("i", [], TensorProto.INT64),
            models.value("on", [], TensorProto.BOOL),
            models.value("before", [32, 32]),
        ],
        [models.value("on_out", [], TensorProto.BOOL), models.value("after", [32, 32])],
    )
    nodes = [
        helper.make_node("Shape", ["input"], ["size"], start=0, end=1),
        helper.make_node("Mul", ["size", "rounds"], ["scaled"]),
        helper.make_node("Add", ["scaled", "fixed"], ["sum"]),
        helper.make_node("Squeeze", ["sum"], ["trips"]),
        helper.make_node("Loop", ["trips", "", "big"], ["last"], body=body),
        helper.make_node("ReduceMax", ["last"], ["one"], keepdims=0),
        helper.make_node("Sub", ["one", "one"], ["zero"]),
        helper.make_node("MatMul", ["input", "w"], ["product"]),
        helper.make_node("Add", ["product", "zero"], ["logits"]),
    ]
    constants = [
        models.tensor("w", w),
        models.tensor("big", big),
        models.tensor("rounds", [rounds], np.int64),
        models.tensor("fixed", [fixed], np.int64),
    ]
    return models.make_model(
        nodes, [models.value("input", ["batch", 8])], [models.value("logits", ["batch", 4])], constants
    )


def test_it_is_timed_as_one_engine_that_is_the_faster_at_either_size(tmp_path: Path) -> None:
    """By construction: one works for every sample, the other as much for any batch. Many times, so that no company on
    the machine turns it around."""
    engines = {"small": ("onnxruntime", slow_beyond(20, 0)), "large": ("onnxruntime", slow_beyond(0, 100))}
    engine, runtime = side_by_side(tmp_path, engines, most=8)
    (tmp_path / "work").mkdir()
    inputs = {"baseline": tmp_path / "model-small", "engine.large": engine / "large", "engine.both": engine}
    large = EngineOption(id="large", backend="onnxruntime", runtime=runtime["engines"][1]["runtime"])
    options = BenchmarkOptions(
        engines=[large, EngineOption(id="both", backend="by-batch", runtime=runtime, beside=True)],
        batch_sizes=[1, 32],
        min_seconds=0.05,
        rounds=5,
    )
    found = Benchmark().run(StageContext(inputs, tmp_path / "work", tmp_path / "out", Notes(), describe()), options)
    ms = {i: [e["batches"][b]["mean_ms"] for b in ("1", "32")] for i, e in found.data["engines"].items()}
    assert ms["baseline"][0] < ms["large"][0] / 2
    assert ms["large"][1] < ms["baseline"][1] / 2
    assert ms["both"][0] < ms["large"][0] / 1.5
    assert ms["both"][1] < ms["baseline"][1] / 1.5
    both = found.data["engines"]["both"]
    over = [both["batches"][b]["beside"]["large"]["speedup"]["ratio"] for b in ("1", "32")]
    assert over[0] > 1.5 > 1.2 > over[1], "over the other engine, by rounds of both"
    assert "beside" not in found.data["engines"]["large"]["batches"]["1"]
    assert both["size_bytes"] == sum((engine / n).stat().st_size for n in names_in(engine))
    assert both["peak_memory_mb"] > 0
    assert both["cold_start_ms"] > 0
