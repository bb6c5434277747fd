"""The bundle's `infer.py`, executed: TensorRT and PyCUDA are stand-ins, everything else is the script's own."""

from __future__ import annotations

import json
import runpy
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from tests.factories import cuda_standin, tensorrt_standin
from tests.factories import onnx_models as models
from tests.factories.tensorrt_standin import Behaviour
from tests.unit.test_trt_build import Recorder
from tests.unit.test_trt_runner import nonzero_model, reference
from workers.backends.tensorrt import TensorRtBackend


class Memory:
    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)

    def __int__(self) -> int:
        return int(self.array.ctypes.data)


class Context:
    """PyCUDA's primary context: current in a thread that pushed it; importing `autoprimaryctx` does so once."""

    def __init__(self) -> None:
        self.threads: Counter[int] = Counter([threading.get_ident()])

    def push(self) -> None:
        self.threads[threading.get_ident()] += 1

    def pop(self) -> None:
        self.threads[threading.get_ident()] -= 1

    def check(self) -> None:
        assert self.threads[threading.get_ident()] > 0, "no context is current in this thread"


def fake_pycuda(name: str, capability: tuple[int, int]) -> dict[str, ModuleType]:
    """What the script uses of PyCUDA, on host memory."""
    context = Context()
    driver, primary, package = (ModuleType(f"pycuda{n}") for n in (".driver", ".autoprimaryctx", ""))

    def alloc(nbytes: int) -> Memory:
        context.check()
        return Memory(nbytes)

    def copy_in(memory: Memory, array: Any, _stream: Any) -> None:
        memory.array[: array.nbytes] = array.reshape(-1).view(np.uint8)

    def copy_out(array: Any, memory: Memory) -> None:
        array.reshape(-1).view(np.uint8)[...] = memory.array[: array.nbytes]

    driver.__dict__.update(
        mem_alloc=alloc,
        memcpy_htod_async=copy_in,
        memcpy_dtoh=copy_out,
        Stream=lambda: SimpleNamespace(handle=7, synchronize=lambda: None),
    )
    device = SimpleNamespace(compute_capability=lambda: capability, name=lambda: name)
    primary.__dict__.update(device=device, context=context)
    package.__dict__.update(driver=driver, autoprimaryctx=primary)
    return {"pycuda": package, "pycuda.driver": driver, "pycuda.autoprimaryctx": primary}


@pytest.fixture
def behaviour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Behaviour]:
    with cuda_standin.installed(monkeypatch, tmp_path / "cache") as found:
        yield found


def bundle(model: onnx.ModelProto, feeds: dict[str, Any], tmp_path: Path, **options: Any) -> Path:
    out = tmp_path / "bundle"
    out.mkdir()
    backend = TensorRtBackend()
    built = backend.build(models.folder(model, tmp_path / "model"), out, options, Recorder())
    (out / "infer.py").write_text(backend.infer_script(built["runtime"]))
    np.savez(out / "sample_input.npz", **feeds)
    np.savez(out / "expected_output.npz", **reference(model, feeds))
    return out


def execute(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    *arguments: str,
    gpu: str = cuda_standin.GPU["name"],
    capability: tuple[int, int] = (9, 0),
) -> None:
    for name, module in fake_pycuda(gpu, capability).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["infer.py", *arguments])
    runpy.run_path(str(out / "infer.py"), run_name="__main__")


@pytest.mark.usefixtures("behaviour")
def test_it_runs_the_sample_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feeds = {"input": np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)}
    out = bundle(models.conv_net(), feeds, tmp_path)
    execute(out, monkeypatch)
    assert "the same as where it was built" in capsys.readouterr().out
    np.testing.assert_allclose(
        np.load("output.npz")["logits"], np.load(out / "expected_output.npz")["logits"], rtol=1e-5
    )
    np.savez("mine.npz", input=feeds["input"][:1])
    execute(out, monkeypatch, "mine.npz", "theirs.npz")
    assert np.load("theirs.npz")["logits"].shape == (1, 4)


@pytest.mark.usefixtures("behaviour")
def test_an_output_whose_shape_depends_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(nonzero_model(), {"x": np.eye(4, dtype=np.float32)[:2]}, tmp_path)
    execute(out, monkeypatch)
    np.testing.assert_array_equal(np.load("output.npz")["where"], [[0, 1], [0, 1]])


@pytest.mark.usefixtures("behaviour")
def test_it_refuses_what_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(models.mlp(), {"input": np.ones((1, 8), np.float32)}, tmp_path)
    np.savez("large.npz", input=np.ones((99, 8), np.float32))
    np.savez("other.npz", x=np.ones((1, 8), np.float32))
    with pytest.raises(SystemExit, match="not built for shapes"):
        execute(out, monkeypatch, "large.npz")
    with pytest.raises(SystemExit, match="the inputs are input"):
        execute(out, monkeypatch, "other.npz")
    with pytest.raises(SystemExit, match="here is NVIDIA L4"):
        execute(out, monkeypatch, gpu="NVIDIA L4", capability=(8, 9))
    with pytest.raises(SystemExit, match="here is NVIDIA H200"):
        execute(out, monkeypatch, gpu="NVIDIA H200")
    monkeypatch.setattr(tensorrt_standin, "__version__", "12.0")
    with pytest.raises(SystemExit, match="needs TensorRT 11"):
        execute(out, monkeypatch)


@pytest.mark.usefixtures("behaviour")
def test_a_plan_that_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = bundle(models.mlp(), {"input": np.ones((1, 8), np.float32)}, tmp_path)
    with (out / "engine.plan").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SystemExit, match="download the bundle again"):
        execute(out, monkeypatch)


def test_the_runtime_options_are_in_it() -> None:
    script = TensorRtBackend().infer_script({"declared": {"x": "float64"}})
    told = script.split('json.loads(r"""')[1].split('"""')[0]
    assert json.loads(told) == {"declared": {"x": "float64"}}
