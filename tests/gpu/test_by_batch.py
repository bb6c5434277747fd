"""Two engines in one bundle on a GPU: each call goes to the one for its batch size, here and in `infer.py`."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.models import Case, Notes
from tests.gpu.test_stages import Chain, isolated
from workers.kernel import Backend, backends
from workers.measure.pieces import folder_digest
from workers.pipeline.isolated import IsolatedRunner

__all__ = ["isolated"]
MOST = 3


def test_a_call_goes_to_the_engine_of_its_batch_size(
    isolated: IsolatedRunner,
    ort_cuda: Backend,
    gpu: dict[str, Any],
    case: Case,
    tmp_path: Path,
) -> None:
    half, _ = case.converted("fp16", gpu)
    engine, told = tmp_path / "engine", []
    for name, model, most in (("small", half, MOST), ("large", case.simplified, None)):
        (engine / name).mkdir(parents=True)
        built = ort_cuda.build(model, engine / name, {"cuda_graph": True}, Notes())
        told.append({"folder": name, "backend": "onnxruntime-cuda", "runtime": built["runtime"], "most": most})
    runtime = {"input": next(iter(case.feeds)), "axis": 0, "engines": told}
    backend = backends()["by-batch-cuda"]()
    both = backend.load(engine, runtime)
    small, large = (ort_cuda.load(engine / e["folder"], e["runtime"]) for e in told)
    for count in (1, MOST, MOST + 1, 8):
        feeds = {n: np.ascontiguousarray(a[:count]) for n, a in case.feeds.items()}
        wanted, other = (s.run(feeds) for s in ((small, large) if count <= MOST else (large, small)))
        found = both.run(feeds)
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        assert any(not np.allclose(found[n], other[n], rtol=1e-5, atol=1e-6) for n in found), "halves of one precision"
        both.bind(feeds)()
        profile = both.profile(feeds)
        assert profile is not None
        assert profile["compute_ms"] > 0
    for session in (both, small, large):
        session.close()
    chain = Chain(isolated, tmp_path, gpu)
    options = {"name": "it", "backend": backend.name, "runtime": runtime, "manifest": {}}
    options |= {"engine_format": backend.engine_format, "engine_digest": folder_digest(engine)}
    packed, _ = chain.run("package", {"engine": engine, "data": case.data}, **options)
    unpacked = tmp_path / "bundle"
    zipfile.ZipFile(packed / "bundle" / "it-bundle.zip").extractall(unpacked)
    script = next(p for p in unpacked.rglob("infer.py") if p.parent.name not in ("small", "large"))
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "max abs difference to expected_output.npz" in done.stdout
