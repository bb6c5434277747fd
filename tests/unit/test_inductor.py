"""Torch Inductor as a backend, with the real torch and the real C++ compiler."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import OptimizationSpec
from tests.factories import programs
from tests.unit.test_export import Notes
from workers import installation
from workers.artifacts import EXPORTED_PROGRAM, ONNX
from workers.backends.inductor import InductorBackend, InductorCudaBackend, build, session
from workers.candidates import Case, Proposal, Step
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder
from workers.hardware import CXX
from workers.installation import KEY_BYTES, Installation
from workers.pipeline import planner

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.skipif(not any(map(shutil.which, CXX)), reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, of its own deprecations
]

INDUCTOR = InductorBackend()
IMAGE = {"image": ("float32", ("batch", 3, 16, 16))}
TEXT = {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))}
ROW = {"input": ("float32", ("batch", 8))}


@pytest.fixture(autouse=True)
def handed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a stage's process: a key, and a folder for what is temporary."""
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    with installation.using(Installation(b"k" * KEY_BYTES)):
        yield


def built(model: Path, out: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    out.mkdir(parents=True)
    with installation.using(Installation(b"k" * KEY_BYTES)):
        return INDUCTOR.build(model, out, options, Notes(), EXPORTED_PROGRAM), out


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """In bf16."""
    root = tmp_path_factory.mktemp("cnn")
    outputs = {"logits": ("float32", ("batch", 10))}
    model = programs.folder(programs.cnn(), root / "model", IMAGE, outputs, {"batch": (1, 64)})
    with pytest.MonkeyPatch.context() as patch:
        (root / "work").mkdir()
        patch.setenv("TMPDIR", str(root / "work"))
        patch.setenv("HOME", str(root / "work"))
        found = built(model, root / "engine", precision="bf16")
    assert not [*(root / "work").iterdir()], "caches and unpacked files are gone"
    return found


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    root = tmp_path_factory.mktemp("transformer")
    outputs = {"scores": ("float32", ("batch", 4)), "seen": ("int64", ("batch", "time"))}
    dims = {"batch": (1, 32), "time": (2, 64)}
    model = programs.folder(programs.transformer(), root / "model", TEXT, outputs, dims)
    return built(model, root / "engine")


def images(batch: int) -> dict[str, Any]:
    return {"image": np.random.default_rng(batch).standard_normal((batch, 3, 16, 16), dtype=np.float32)}


def texts(batch: int, time: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    return {"ids": rng.integers(0, 50, (batch, time)), "mask": rng.integers(0, 2, (batch, time)) | 1}


def far(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def test_cnn_in_bf16(cnn: tuple[dict[str, Any], Path]) -> None:
    data, engine = cnn
    assert data["runtime"] == {"form": "package"}
    assert data["fused"] == {"batch_norm": 2}
    assert data["trial_run"] == {"batch": 1}
    assert sorted(p.name for p in engine.iterdir()) == ["engine.json", "interface.json", "model.pt2"]
    loaded, net = INDUCTOR.load(engine, data["runtime"]), programs.cnn()
    assert [i.shape for i in loaded.inputs] == [("batch", 3, 16, 16)]
    for batch in (1, 2, 7, 64):
        feeds = images(batch)
        found, (wanted,) = loaded.run(feeds)["logits"], programs.answers(net, feeds)
        assert found.dtype == np.float32
        assert 0 < far(found, wanted) < 0.02, "in bf16, and no worse"
        assert np.array_equal(loaded.call(feeds)()["logits"], found)
        loaded.bind(feeds)()


def test_transformer_in_fp32(transformer: tuple[dict[str, Any], Path]) -> None:
    data, engine = transformer
    loaded, net = INDUCTOR.load(engine, INDUCTOR.with_threads(data["runtime"], 1)), programs.transformer()
    for batch, time in ((1, 2), (1, 16), (5, 16), (2, 64)):
        feeds = texts(batch, time)
        scores, mask = programs.answers(net, feeds)
        found = loaded.run(feeds)
        assert far(found["scores"], scores) < 1e-5
        assert np.array_equal(found["seen"], mask)
        found["seen"][:] = 9
        assert not (feeds["mask"] == 9).any(), "outputs are arrays of their own"


@pytest.mark.parametrize(
    ("feeds", "said"),
    [
        (texts(2, 65), "exported for 2 to 64"),
        ({**texts(2, 8), "mask": texts(2, 9)["mask"]}, "time is 8"),
        ({"ids": texts(2, 8)["ids"].astype(np.int32), "mask": texts(2, 8)["mask"]}, "is int32"),
        ({"ids": texts(2, 8)["ids"]}, "missing"),
        ({**texts(2, 8), "more": np.ones(1)}, "no input 'more'"),
        ({"ids": np.ones((2, 8, 1), np.int64), "mask": texts(2, 8)["mask"]}, "3 axes"),
    ],
)
def test_what_the_code_was_not_compiled_for(
    transformer: tuple[dict[str, Any], Path], feeds: dict[str, Any], said: str
) -> None:
    """It would read beyond its arrays."""
    loaded = INDUCTOR.load(transformer[1], transformer[0]["runtime"])
    for call in (loaded.run, lambda f: loaded.call(f)(), loaded.bind):
        with pytest.raises(StageFailure, match=said) as caught:
            call(feeds)
        assert caught.value.code == "inference_failed"


def _one_byte(engine: Path) -> None:
    content = bytearray((engine / "model.pt2").read_bytes())
    content[len(content) // 2] ^= 1
    (engine / "model.pt2").write_bytes(content)


def _wider(engine: Path) -> None:
    told = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps({**told, "ranges": {"image": [[None, None]] * 4}}))


def _renamed(engine: Path) -> None:
    text = (engine / "interface.json").read_text()
    (engine / "interface.json").write_text(text.replace("logits", "others"))


@pytest.mark.parametrize("change", [_one_byte, _wider, _renamed])
def test_a_changed_engine_is_not_loaded(
    cnn: tuple[dict[str, Any], Path], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data, engine = cnn
    changed = shutil.copytree(engine, tmp_path / "changed")
    change(changed)
    with pytest.raises(StageFailure, match="native code") as caught:
        INDUCTOR.load(changed, data["runtime"])
    assert caught.value.code == "engine_untrusted"


def test_engines_of_others(cnn: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another installation's, one for another processor, one without a file."""
    data, engine = cnn
    with (
        installation.using(Installation(b"o" * KEY_BYTES)),
        pytest.raises(StageFailure, match="another installation") as caught,
    ):
        INDUCTOR.load(engine, data["runtime"])
    assert caught.value.code == "engine_untrusted"
    with installation.using(Installation()), pytest.raises(StageFailure) as caught:
        INDUCTOR.load(engine, data["runtime"])
    assert caught.value.code == "engine_key_missing"
    with pytest.raises(StageFailure) as caught:
        INDUCTOR.load(engine, {"form": "cache"})
    assert caught.value.code == "load_failed"
    here = session.target("cpu")
    monkeypatch.setattr(session, "target", lambda device: {**here, "instructions": ["sse4_2"]})
    with pytest.raises(StageFailure, match="compiled for instructions") as caught:
        INDUCTOR.load(engine, data["runtime"])
    assert caught.value.code == "engine_incompatible"


def test_infer_in_a_clean_process(cnn: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """What the bundle's `infer.py` prints and gives, and what it refuses; without a compiler, and far from here."""
    data, engine = cnn
    bundle, feeds = shutil.copytree(engine, tmp_path / "bundle"), images(3)
    (bundle / "infer.py").write_text(INDUCTOR.infer_script(data["runtime"]))
    (bundle / "manifest.json").write_text(json.dumps({"engine": {"precision": "bf16"}}))
    expected = INDUCTOR.load(engine, data["runtime"]).run(feeds)
    np.savez(bundle / "sample_input.npz", **feeds)
    np.savez(bundle / "expected_output.npz", **expected)
    np.savez(bundle / "odd.npz", image=np.ones((1, 3, 15, 16), np.float32))
    (tmp_path / "home").mkdir()
    environment = {"PATH": "/nowhere", "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "infer.py", *arguments, "--repeat", "2"]
        return subprocess.run(command, cwd=bundle, env=environment, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    assert "the same as where it was built" in done.stdout
    with np.load(bundle / "output.npz") as outputs:
        assert np.array_equal(outputs["logits"], expected["logits"])
    refused = run("odd.npz")
    assert refused.returncode != 0
    assert "size 15 on axis 2" in refused.stderr


def test_the_other_form(tmp_path: Path) -> None:
    """The program with Inductor's cache, loaded by a process whose caches are empty: bit for bit the same."""
    outputs = {"y": ("float32", ("batch", 3))}
    model = programs.folder(programs.linear(), tmp_path / "model", ROW, outputs, {"batch": (1, 64)})
    data, engine = built(model, tmp_path / "engine", form="cache")
    assert data["runtime"] == {"form": "cache"}
    assert sorted(p.name for p in engine.iterdir()) == ["cache.bin", "engine.json", "interface.json", "program.pt2"]
    here = INDUCTOR.load(engine, data["runtime"])
    (engine / "infer.py").write_text(INDUCTOR.infer_script(data["runtime"]))
    feeds = {"input": np.random.default_rng(0).standard_normal((5, 8), dtype=np.float32)}
    np.savez(engine / "sample_input.npz", **feeds)
    (tmp_path / "home").mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    command = [sys.executable, "infer.py", "--repeat", "1"]
    done = subprocess.run(command, cwd=engine, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(engine / "output.npz") as found:
        assert np.array_equal(found["y"], here.run(feeds)["y"])


def test_an_engine_with_products_in_float8(tmp_path: Path) -> None:
    """Of a calibrated program, built, loaded and run: a GPU is needed for its speed alone."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    shapes = {"input": ("float32", ("batch", 16))}, {"y": ("float32", ("batch", 16))}
    model = programs.folder(net, tmp_path / "model", *shapes, {"batch": (1, 64)})
    rows = np.random.default_rng(0).standard_normal((64, 16), dtype=np.float32)
    program_ranges.write(model, program_ranges.observed(ProgramFolder.read(model), [{"input": rows}]))
    data, engine = built(model, tmp_path / "engine", precision="bf16")
    assert (data["precision"], data["fused"]) == ("fp8", {"fp8_product": 2})
    loaded = INDUCTOR.load(engine, data["runtime"])
    for batch in (1, 7):
        feeds = {"input": rows[:batch]}
        assert 0.001 < far(loaded.run(feeds)["y"], programs.answers(net, feeds)[0]) < 0.1


def test_a_program_that_inductor_cannot_compile(tmp_path: Path) -> None:
    shapes = {"x": ("float32", (4, 4))}
    model = programs.folder(programs.unlowered(), tmp_path / "model", shapes, {"y": ("float32", (4, 4))})
    with pytest.raises(StageFailure, match="Inductor cannot compile the program:") as caught:
        built(model, tmp_path / "engine")
    assert (caught.value.code, caught.value.kind) == ("compile_failed", FailureKind.MODEL)
    assert str(tmp_path) not in str(caught.value)


def test_compilers_that_fail_or_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = {"y": ("float32", ("batch", 3))}
    model = programs.folder(programs.linear(), tmp_path / "model", ROW, outputs, {"batch": (1, 64)})
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(StageFailure) as caught:
        built(model, tmp_path / "none")
    assert (caught.value.code, caught.value.kind, caught.value.cacheable) == (
        "compiler_missing",
        FailureKind.MODEL,
        False,
    )
    (folder / "g++").write_text("#!/bin/sh\necho 'internal compiler error' >&2\nexit 4\n")
    (folder / "g++").chmod(0o755)
    with pytest.raises(StageFailure) as caught:
        built(model, tmp_path / "broken")
    assert caught.value.code == "compile_failed"


def test_a_loader_that_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the process that tries it ends; an engine of the other form comes out of it."""
    monkeypatch.setattr(build, "_LOADS", "import os; os.kill(os.getpid(), 11)")
    assert build._refused(tmp_path / "model.pt2", tmp_path) == "its loader crashed (signal 11)"
    monkeypatch.setattr(build, "_LOADS", "raise RuntimeError('no such symbol')")
    assert "no such symbol" in (build._refused(tmp_path / "model.pt2", tmp_path) or "")


def case(**changes: Any) -> Case:
    spec = OptimizationSpec.model_validate({"model_id": "m", "budget_seconds": 300, **changes.pop("spec", {})})
    known = Case(spec, {"Conv": 3}, "cnn", kinds=(ONNX, EXPORTED_PROGRAM), isa=("avx512_bf16",), cores=2)
    return replace(known, hardware={"cxx": "g++ 12"}, **changes)


def test_what_is_proposed() -> None:
    assert [c.id for c in INDUCTOR.propose(case()).candidates] == ["ti-fp32", "ti-bf16"]
    assert [c.lossless for c in INDUCTOR.propose(case()).candidates] == [True, False]
    for unfit, said in (
        (case(kinds=(ONNX,)), r"only for \.pt2: .* in fp32 and bf16\. Measured elsewhere.* slower one.*MobileNetV2"),
        (replace(case(), hardware={}), "has none"),
        (case(spec={"budget_seconds": 30}), "the budget is 30 s"),
    ):
        found = INDUCTOR.propose(unfit)
        assert not found.candidates
        assert re.search(said, found.skipped[0].reason)
    (skipped,) = INDUCTOR.propose(replace(case(), isa=())).skipped
    assert "no bf16 instructions" in skipped.reason


def test_what_is_proposed_for_a_gpu() -> None:
    """Convolutions with channels last, without where they are few, both where they are neither; fp8 of calibrated
    matrix products where the GPU has them."""

    def proposal(capability: str = "9.0", ops: dict[str, int] | None = None, **changes: Any) -> Proposal:
        card = {"cxx": "g++ 12", "gpu": {"compute_capability": capability}}
        known = replace(case(**changes), hardware=card, ops=ops or {"Conv": 3})
        return InductorCudaBackend().propose(known)

    found = proposal().candidates
    assert [c.id for c in found] == ["tic-fp32", "tic-fp16-nhwc", "tic-bf16-nhwc"]
    assert [c.build_options.get("channels_last", False) for c in found] == [False, True, True]
    mixed = proposal(ops={"Conv": 22, "MatMul": 37}, spec={"precisions": ["fp16"]}).candidates
    assert [c.id for c in mixed] == ["tic-fp16-nhwc", "tic-fp16"]
    vit, data = {"Conv": 1, "MatMul": 72}, {"calibration": {"dataset_id": "d", "max_samples": 100}}
    (*plain, fp8) = proposal(ops=vit, spec=data, has_calibration=True).candidates
    assert not [c for c in plain if "channels_last" in c.build_options]
    built = {"precision": "fp16", "batch": 8}
    assert (fp8.id, fp8.precision, fp8.lossless, fp8.build_options) == ("tic-fp8", "fp8", False, built)
    for sizes, largest in (([1, 16, 8], 16), ([1], 2), ([1, 512], 32)):
        measured = proposal(spec={"benchmark": {"batch_sizes": sizes}}).candidates
        assert {c.build_options["batch"] for c in measured} == {largest}
    assert fp8.steps == (Step("observe", {"max_samples": 64, "part": "all"}, ("calibration",)),)
    assert planner._misfit(fp8, (ONNX, EXPORTED_PROGRAM), InductorCudaBackend.accepts) is None
    assert "observe takes exported-program" in (planner._misfit(fp8, (ONNX,), InductorCudaBackend.accepts) or "")
    asked = {"precisions": ["fp8"]}
    for unfit, said in (
        (proposal("8.6", vit, spec=data | asked, has_calibration=True), "needs? 8.9"),
        (proposal(spec=data | asked, has_calibration=True), "no float32 matrix products"),
        (proposal(ops=vit, spec=asked), "needs calibration data"),
    ):
        assert not unfit.candidates
        assert re.search(said, unfit.skipped[0].reason)


def test_the_compiler_is_part_of_the_key() -> None:
    facts = InductorBackend.facts_of_build
    assert facts({"cxx": "g++ 12"}) != facts({"cxx": "g++ 13"})
    assert not {"torch"} - {*INDUCTOR.libraries}
