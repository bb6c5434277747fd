"""The bundle that a user unpacks: what its `infer.py` does is what was timed, and it tells whether the engine
answers here as it did there."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from onnx import ModelProto, helper

from app.domain.failures import FailureKind, StageFailure
from tests.factories import onnx_models as models
from workers.artifacts import BY_BATCH, CHAINED
from workers.backends.bundle_script import CHECK
from workers.hardware import describe
from workers.kernel import Reporter, StageContext, backends
from workers.measure.pieces import folder_digest
from workers.serving import SHIPPED
from workers.serving.batcher import Batcher
from workers.stages.package import Package, PackageOptions

CPU_BACKENDS = ("onnxruntime", "openvino")


class Notes(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


def loaded(folder: Path) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The `run` of the bundle's `infer.py`."""
    spec = importlib.util.spec_from_file_location(f"infer_{folder.name}", folder / "infer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    _names, run = module.load()
    found: Callable[[dict[str, Any]], dict[str, Any]] = run
    return found


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_what_is_timed_is_what_the_loader_does(name: str, tmp_path: Path) -> None:
    """The same outputs by name, each in memory of its own, as a caller of `infer.py` gets them."""
    backend = backends()[name]()
    engine = tmp_path / "engine"
    engine.mkdir()
    built = backend.build(models.folder(models.mlp(), tmp_path / "model"), engine, {}, Notes())
    (engine / "infer.py").write_text(backend.infer_script(built["runtime"]))
    run, session = loaded(engine), backend.load(engine, built["runtime"])
    rng = np.random.default_rng(0)
    first, second = ({"input": rng.normal(size=(n, 8)).astype(np.float32)} for n in (2, 3))
    timed = session.call(first)()
    kept = {n: a.copy() for n, a in timed.items()}
    session.call(second)()
    for outputs in (run(first), timed):  # the next call wrote over nothing
        assert outputs.keys() == kept.keys()
        for output, array in outputs.items():
            np.testing.assert_array_equal(array, kept[output])
            assert array.flags.owndata or array.base is None or name == "onnxruntime"
    session.close()


FIGURES = {
    "latency_ms": 0.05,
    "original_latency_ms": 0.1,
    "speedup": "2.0x",
    "speedup_ci": [1.9, 2.1],
    "batch_size": 1,
    "shape": {"input": ["batch", 8]},
    "accuracy_loss_percent": 0.25,
    "accuracy_metric": "top1",
    "accuracy_basis": "labels",
    "accuracy_value": 0.9575,
    "original_accuracy_value": 0.96,
    "accuracy_samples": 400,
    "limit_percent": 1.0,
    "accuracy_verdict": "unproven",
    "bound": {"p50_ms": 0.03},
}
DEPLOYMENT = {"instances": 2, "threads_per_instance": 1, "batch_size": 8, "throughput_qps": 9000.0, "runtime": {"a": 1}}
# What a bundle may import: the standard library and what its requirements.txt lists. Everything else is not there.
ONLY = """
import runpy, sys
allowed, script = set(sys.argv[1].split(",")), sys.argv[2]

class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in allowed and not top.startswith("_"):
            raise ModuleNotFoundError(f"{top} is not in requirements.txt", name=top)
        return None

sys.meta_path.insert(0, Refuse())
sys.argv = [script, *sys.argv[3:]]
runpy.run_path(script, run_name="__main__")
"""


def packaged(
    name: str, model: ModelProto, folder: Path, judged: str = "", **manifest: Any
) -> tuple[Path, dict[str, Any]]:
    """The unpacked bundle of an engine, by the stage itself; and the stage's data."""
    backend, engine = backends()[name](), folder / "engine"
    engine.mkdir(parents=True)
    built = backend.build(models.folder(model, folder / "model"), engine, {}, Notes())
    (folder / "work").mkdir()
    context = StageContext({"engine": engine}, folder / "work", folder / "out", Notes(), describe())
    told = {"job": {"id": "job_1"}, "engine": {"precision": "fp32"}, **manifest}
    options = PackageOptions(
        name="m-fp32",
        backend=name,
        runtime=built["runtime"],
        engine_format="onnx",
        manifest=told,
        engine_digest=judged or folder_digest(engine),
    )
    data = dict(Package().run(context, options).data)
    with zipfile.ZipFile(folder / "out/bundle" / data["bundle_file"]) as archive:
        archive.extractall(folder / "bundle")
    return folder / "bundle", data


def infer(bundle: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python infer.py` where only what the bundle requires can be imported."""
    lines = (bundle / "requirements.txt").read_text().splitlines()
    required = ",".join(line.split("==")[0].replace("-", "_") for line in lines)
    command = [sys.executable, "-c", ONLY, required, str(bundle / "infer.py"), *arguments]
    return subprocess.run(command, cwd=bundle, capture_output=True, text=True, timeout=120, check=False)


def test_an_engine_that_is_not_the_judged_one_is_not_packed(tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as caught:
        packaged("onnxruntime", models.mlp(), tmp_path, judged="0" * 64)
    assert (caught.value.code, caught.value.kind) == ("engine_changed", FailureKind.INFRASTRUCTURE)
    assert not caught.value.cacheable


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_a_bundle_runs_with_its_requirements_alone_and_tells_a_difference(name: str, tmp_path: Path) -> None:
    bundle, data = packaged(name, models.mlp(), tmp_path, figures=FIGURES, deployment=DEPLOYMENT)
    lines = (bundle / "requirements.txt").read_text().splitlines()
    wanted = sorted((name, "numpy", "httptools", "orjson", "uvloop"))
    assert lines == [f"{n}=={importlib.metadata.version(n)}" for n in wanted], "and no other library"
    assert data["not_repeatable"] == []
    same = infer(bundle, "--repeat", "1") if name == "onnxruntime" else infer(bundle)
    assert same.returncode == 0, same.stderr
    assert "the same as where it was built, as far as fp32 carries" in same.stdout

    with np.load(bundle / "expected_output.npz") as expected:
        logits = expected["logits"]
    for change, code in ((1e-5, 0), (1e-2, 1)):  # rounding; another answer
        np.savez(bundle / "expected_output.npz", logits=logits + change * np.abs(logits).max())
        assert infer(bundle).returncode == code
    np.savez(bundle / "expected_output.npz", logits=logits, other=logits)
    lacking = infer(bundle)
    assert (lacking.returncode, "output other differs" in lacking.stderr) == (1, True)
    np.savez(bundle / "mine.npz", input=np.ones((3, 8), np.float32))
    assert infer(bundle, "mine.npz", "theirs.npz").returncode == 0, "with inputs of one's own nothing is compared"


def test_the_readme_and_the_manifest_tell_what_was_found(tmp_path: Path) -> None:
    bundle, _ = packaged("onnxruntime", models.mlp(), tmp_path, figures=FIGURES, deployment=DEPLOYMENT)
    text = (bundle / "README.md").read_text()
    for words in (
        "2.0x [1.90, 2.10] (95 %) as fast as the original at batch size 1, shape input ['batch', 8]",
        "p50 0.05 ms by a call of `run`, the original's 0.1 ms",
        "p50 0.03 ms where inputs and outputs are bound before",
        "accuracy loss 0.25 (top1: 0.9575, the original 0.96; 400 samples, by labels), the limit was 1: unproven",
        "2 instance(s) with 1 thread(s) each, batch size 8: 9000 samples per second",
    ):
        assert words in text
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["job"]["id"], manifest["figures"], manifest["deployment"]) == ("job_1", FIGURES, DEPLOYMENT)


def test_what_is_random_is_not_compared(tmp_path: Path) -> None:
    """Dropout in training mode: two calls never agree, so no second machine can."""
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["random"]),
        helper.make_node("Relu", ["x"], ["fixed"]),
    ]
    x, outputs = models.value("x", ["n", 4]), [models.value(n, ["n", 4]) for n in ("random", "fixed")]
    bundle, data = packaged("onnxruntime", models.make_model(nodes, [x], outputs, []), tmp_path)
    assert data["not_repeatable"] == ["random"]
    assert json.loads((bundle / "manifest.json").read_text())["not_repeatable"] == ["random"]
    assert "differ from call to call: random" in (bundle / "README.md").read_text()
    with np.load(bundle / "expected_output.npz") as expected:
        assert expected.files == ["fixed"]
    assert infer(bundle).returncode == 0


@pytest.mark.parametrize(
    ("found", "wanted", "precision", "same"),
    [
        ([1.0, np.nan, np.inf], [1.0, np.nan, np.inf], "fp32", True),
        ([1.0, 2.0, 3.0], [1.0, np.nan, 3.0], "fp32", False),
        ([1.0, -np.inf], [1.0, np.inf], "int8", False),
        ([100.0, 1.0], [100.0, 4.0], "int8", True),  # 3 % of the largest
        ([100.0, 1.0], [100.0, 4.0], "fp32", False),
        ([3, 1], [3, 2], "int8", False),  # numbers of classes
        ([True, False], [True, True], "fp32", False),
        ([[1.0]], [1.0], "fp32", False),
        ([], [], "fp32", True),
    ],
)
def test_how_near_is_the_same(found: Any, wanted: Any, precision: str, same: bool, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"engine": {"precision": precision}}))
    np.savez(tmp_path / "expected_output.npz", y=np.asarray(wanted))
    scope: dict[str, Any] = {"np": np, "json": json, "sys": sys, "HERE": tmp_path}
    exec(CHECK, scope)
    assert scope["as_expected"]({"y": np.asarray(found)}) is same


def test_what_an_npz_does_not_know_is_compared_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"engine": {"precision": "bf16"}}))
    answer = np.linspace(-4, 4, 9).astype(ml_dtypes.bfloat16)
    np.savez(tmp_path / "expected_output.npz", y=answer)
    scope: dict[str, Any] = {"np": np, "json": json, "sys": sys, "HERE": tmp_path}
    exec(CHECK, scope)
    assert scope["as_expected"]({"y": answer})
    assert not scope["as_expected"]({"y": (answer + 1).astype(ml_dtypes.bfloat16)})


def test_the_bundle_was_run_before_it_ships(tmp_path: Path) -> None:
    """`infer.py` and `serve.py`, in clean processes; the server with what the bundle requires, too."""
    figures = {**FIGURES, "batches": {"1": {}, "8": {}}}
    bundle, data = packaged("onnxruntime", models.mlp(), tmp_path, figures=figures)
    assert data["tried"]["largest_difference"] < 1e-5
    assert {*SHIPPED, "serving.json", "Dockerfile"} <= {*data["files"]}
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert {n for n in data["files"] if not n.startswith(("triton/", "kserve/"))} == {*manifest["files"], "kinds.json"}
    assert all((bundle / name).is_file() for name in manifest["files"])
    told = json.loads((bundle / "serving.json").read_text())
    assert told == manifest["serving"] == data["serving"]
    assert (told["max_batch"], told["batch_axis"], told["reason"]) == (8, {"input": 0}, None)
    assert "`POST /v2/models/m-fp32/infer`" in (bundle / "README.md").read_text()
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert hadolint is not None
    found = subprocess.run([hadolint, str(bundle / "Dockerfile")], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_callers_of_the_server_share_batches_of_the_engine(tmp_path: Path) -> None:
    bundle, _ = packaged("onnxruntime", models.mlp(), tmp_path, figures={"batches": {"1": {}, "8": {}}})
    run = loaded(bundle)
    rng = np.random.default_rng(0)
    asked = [{"input": rng.normal(size=(1 + i % 3, 8)).astype(np.float32)} for i in range(32)]

    async def main() -> list[dict[str, Any]]:
        async with Batcher(bundle) as batcher:
            answers = await asyncio.gather(*(batcher.submit(a) for a in asked))
            assert max(batcher.stats.batches) > 1
            return answers

    for feeds, answer in zip(asked, asyncio.run(main()), strict=True):
        np.testing.assert_allclose(answer["logits"], run(feeds)["logits"], atol=1e-5)


def test_what_depends_on_the_batch_is_served_one_by_one(tmp_path: Path) -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"], axis=0)]
    model = models.make_model(nodes, [models.value("x", ["n", 4])], [models.value("y", ["n", 4])], [])
    bundle, data = packaged("onnxruntime", model, tmp_path, figures={"batches": {"1": {}, "8": {}}})
    assert data["serving"]["max_batch"] == 1
    assert "served one by one: output y of a sample changes" in data["serving"]["reason"]
    assert data["serving"]["reason"] in (bundle / "README.md").read_text()


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_numbers_without_an_axis_are_served(name: str, tmp_path: Path) -> None:
    """Seen: a voice detector's sample rate ended the job as it was packaged, and its server refused what was sent."""
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"]), helper.make_node("ReduceMax", ["y"], ["m"], keepdims=0)]
    inputs = [models.value("x", ["n", 4]), models.value("factor", [])]
    model = models.make_model(nodes, inputs, [models.value("y", ["n", 4]), models.value("m", [])], [])
    bundle, data = packaged(name, model, tmp_path, figures={"batches": {"1": {}, "8": {}}})
    assert data["tried"]["largest_difference"] < 1e-5
    assert data["kinds"]["triton"]["backend"] == "python"
    assert 'key: "SCALARS"' in (bundle / "triton" / "config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "raise SystemExit('no such instruction')",
            "infer.py of the bundle, run as its user would, ended with exit code 1",
        ),
        ("def load():\n    return ['input'], lambda feeds: {'logits': feeds['input'][:, :3]}\n", "answered otherwise"),
        (
            "def load():\n    raise OSError('libgone.so')\n",
            "serve.py of the bundle, run as its user would, did not come",
        ),
    ],
)
def test_a_bundle_that_fails_is_a_typed_failure(
    script: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends()["onnxruntime"], "infer_script", lambda self, runtime: script)
    if words.startswith("infer.py"):  # one after the other, as for an engine that is not loaded twice at once
        monkeypatch.setattr("workers.serving.python._LARGE_BYTES", 0)
    with pytest.raises(StageFailure) as caught:
        packaged("onnxruntime", models.mlp(), tmp_path)
    assert (caught.value.code, caught.value.cacheable) == ("bundle_fails", False)
    assert words in caught.value.detail


def test_a_bundle_whose_libraries_are_not_here_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends()["onnxruntime"], "script_libraries", ("no-such-library",))
    _, data = packaged("onnxruntime", models.mlp(), tmp_path)
    assert data["tried"] == {"reason": "this machine lacks no-such-library"}


@pytest.mark.parametrize("name", CPU_BACKENDS)
def test_the_loader_takes_a_number_of_threads(name: str, tmp_path: Path) -> None:
    """As many as an instance is given; the answers are the same."""
    bundle, _ = packaged(name, models.mlp(), tmp_path)
    code = """
import os, sys
import numpy as np
sys.path.insert(0, ".")
import infer
_names, run = infer.load(threads=int(sys.argv[1]))
with np.load("sample_input.npz") as file:
    assert infer.as_expected(run(dict(file)))
print(len(os.listdir("/proc/self/task")))
"""
    counted = []
    for threads in ("1", "5"):
        command = [sys.executable, "-c", code, threads]
        done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=True)
        counted.append(int(done.stdout.split()[-1]))
    if name == "onnxruntime":  # OpenVINO takes no more than there are cores
        assert counted[1] == counted[0] + 4


@pytest.mark.parametrize("name", sorted(backends()))
def test_a_script_takes_the_arguments_that_hurry_it(name: str) -> None:
    """What a backend says of its own script, nobody looks into."""
    kind = backends()[name]
    engine = {"folder": "small", "backend": "onnxruntime", "runtime": {}}
    several: dict[str, dict[str, Any]] = {
        BY_BATCH: {"input": "x", "axis": 0, "engines": [{**engine, "most": None}]},
        CHAINED: {"inputs": [], "outputs": ["y"], "engines": [engine, engine]},
    }
    source = kind().infer_script(several.get(kind.engine_format, {}))
    options = [argument for argument in kind.script_hurry if argument.startswith("--")]
    assert options == [option for option in ("--repeat",) if f'"{option}"' in source]
