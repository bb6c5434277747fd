"""Backend inductor-cuda on a real GPU: outputs as torch's own, CUDA graphs, both forms in fresh processes, cold starts.

Needs torch with CUDA and a C++ compiler, and nothing else of the extra `gpu`:
`python -m pytest tests/gpu/test_inductor.py -s` prints which form was taken, and what each took.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.factories import programs
from tests.unit.test_export import Notes
from workers import installation
from workers.artifacts import EXPORTED_PROGRAM
from workers.backends.inductor import InductorCudaBackend
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder
from workers.installation import KEY_BYTES, Installation

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(900)]

GPU = InductorCudaBackend()
IMAGE = {"image": ("float32", ("batch", 3, 16, 16))}
LOGITS = {"logits": ("float32", ("batch", 10))}
TEXT = {"ids": ("int64", ("batch", "time")), "mask": ("int64", ("batch", "time"))}
SCORES = {"scores": ("float32", ("batch", 4)), "seen": ("int64", ("batch", "time"))}


@pytest.fixture(scope="module", autouse=True)
def handed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    with pytest.MonkeyPatch.context() as patch, installation.using(Installation(b"k" * KEY_BYTES)):
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("work")))
        yield


def built(kind: str, root: Path, **options: Any) -> tuple[dict[str, Any], Path]:
    root.mkdir(parents=True, exist_ok=True)
    if kind == "cnn":
        model = programs.folder(programs.cnn(), root / "model", IMAGE, LOGITS, {"batch": (1, 64)})
    else:
        dims = {"batch": (1, 32), "time": (2, 64)}
        model = programs.folder(programs.transformer(), root / "model", TEXT, SCORES, dims)
    (root / "engine").mkdir()
    notes, start = Notes(), time.perf_counter()
    data = GPU.build(model, root / "engine", options, notes, EXPORTED_PROGRAM)
    took = time.perf_counter() - start
    tell(f"\n{kind} {options}: form {data['form']}, built in {took:.1f} s {[*getattr(notes, 'messages', [])]}")
    return data, root / "engine"


def tell(text: str) -> None:
    """With `-s`, on the terminal."""
    sys.stdout.write(f"{text}\n")


def feeds_of(kind: str, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(batch)
    if kind == "cnn":
        return {"image": rng.standard_normal((batch, 3, 16, 16), dtype=np.float32)}
    return {"ids": rng.integers(0, 50, (batch, 16)), "mask": rng.integers(0, 2, (batch, 16)) | 1}


def far(found: Any, wanted: Any) -> float:
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["cnn", "transformer"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 1e-4), ("fp16", 0.01), ("bf16", 0.05)])
def test_the_gpu_computes_what_torch_does(kind: str, precision: str, most: float, tmp_path: Path) -> None:
    """As it is and as a CUDA graph, at several batch sizes in turns."""
    data, engine = built(kind, tmp_path, precision=precision)
    net = programs.cnn() if kind == "cnn" else programs.transformer()
    for graph in (False, True):
        start = time.perf_counter()
        session = GPU.load(engine, {**data["runtime"], "cuda_graph": graph})
        loaded = time.perf_counter() - start
        session.run(feeds_of(kind, 1))
        first = time.perf_counter() - start - loaded
        for batch in (1, 8, 3, 8, 1):
            feeds = feeds_of(kind, batch)
            wanted, found = programs.answers(net, feeds), session.run(feeds)
            assert [*found] == [o.name for o in session.outputs]
            for output, answer in zip(found.values(), wanted, strict=True):
                assert far(output, answer) < most
            again = session.call(feeds)()
            assert all(np.array_equal(found[n], again[n]) for n in found)
        call, times = session.bind(feeds_of(kind, 8)), []
        for _ in range(100):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        profile = dict(session.profile(feeds_of(kind, 8)) or {})
        session.close()
        assert profile["compute_ms"] > 0
        told = f"load {loaded:.2f} s, first call {first:.2f} s, b=8 bound {1e3 * float(np.median(times)):.3f} ms"
        tell(f"  {'graph' if graph else 'plain'}: {told}, compute {profile['compute_ms']} ms")


def test_products_in_float8(tmp_path: Path) -> None:
    """Of a calibrated program; on a GPU that has none the failure is the compiler's or the library's, and typed."""
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no float8 products")
    dims = {"batch": (1, 32), "time": (2, 64)}
    model = programs.folder(programs.transformer(), tmp_path / "model", TEXT, SCORES, dims)
    program_ranges.write(model, program_ranges.observed(ProgramFolder.read(model), [feeds_of("transformer", 8)]))
    (tmp_path / "engine").mkdir()
    data = GPU.build(model, tmp_path / "engine", {"precision": "fp16"}, Notes(), EXPORTED_PROGRAM)
    assert (data["precision"], data["fused"]) == ("fp8", {"fp8_product": 8, "gelu": 2})
    session, net = GPU.load(tmp_path / "engine", {**data["runtime"], "cuda_graph": True}), programs.transformer()
    for batch in (1, 8, 3):
        feeds = feeds_of("transformer", batch)
        assert 0.001 < far(session.run(feeds)["scores"], programs.answers(net, feeds)[0]) < 0.2
    session.close()


@pytest.mark.parametrize("form", ["package", "cache"])
def test_infer_in_a_fresh_process(form: str, tmp_path: Path) -> None:
    """Bit for bit the same with empty caches; where AOTInductor's loader crashes, the build says so and goes on."""
    data, engine = built("cnn", tmp_path, precision="fp16", **({"form": form} if form == "cache" else {}))
    runtime = {**data["runtime"], "cuda_graph": True}
    session, feeds = GPU.load(engine, runtime), feeds_of("cnn", 3)
    expected = session.run(feeds)
    session.close()
    (engine / "infer.py").write_text(GPU.infer_script(runtime))
    (engine / "manifest.json").write_text(json.dumps({"engine": {"precision": "fp16"}}))
    np.savez(engine / "sample_input.npz", **feeds)
    np.savez(engine / "expected_output.npz", **expected)
    (tmp_path / "home").mkdir()
    kept = {
        k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME")
    }
    home = str(tmp_path / "home")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "infer.py", "--repeat", "20"],
        cwd=engine,
        env={**kept, "HOME": home, "TMPDIR": home},
        capture_output=True,
        text=True,
        check=False,
    )
    tell(f"  infer.py ({data['form']}): {time.perf_counter() - start:.1f} s in all\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    with np.load(engine / "output.npz") as found:
        assert np.array_equal(found["logits"], expected["logits"])
