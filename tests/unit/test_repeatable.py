"""The same inputs give the same quantized bytes in every process, whatever its hash seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.factories import architectures
from tests.unit.test_quantize import dataset

# Runs chains of stages, each on the model of the one before; prints the digest of every file written, by chain.
SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from workers.graph import onnx_files
from workers.kernel import Reporter, StageContext, stages

class Quiet(Reporter):
    def progress(self, fraction, message=""): pass
    def note(self, message, **facts): pass

root, chains, label = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
known, found = stages(), {}
for chain, (steps, limit) in chains.items():
    onnx_files.INLINE_LIMIT_BYTES = limit
    folder, seen = root / chain, found.setdefault(chain, {})
    model = folder / "model"
    for index, (name, options) in enumerate(steps):
        work = folder / label / str(index)
        (work / "scratch").mkdir(parents=True)
        inputs = {"model": model, "calibration": folder / "calibration"}
        stage = known[name]()
        result = stage.run(StageContext(inputs, work / "scratch", work, Quiet(), {}), stage.Options(**options))
        if "model" in result.outputs:
            model = work / "model"
        for path in sorted(p for o in result.outputs for p in (work / o).iterdir()):
            seen[f"{index}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
        if not result.outputs:
            seen[str(index)] = json.dumps(result.data)
print(json.dumps(found))
"""

DYNAMIC: Any = ["quantize", {"recipe": "dynamic_int8"}]
STATIC: Any = ["quantize", {"recipe": "static_int8"}]
ENTROPY: Any = ["quantize", {"recipe": "static_int8", "method": "entropy"}]
SIMPLIFY: Any = ["simplify", {}]
EMBEDDING: Any = ["quantize", {"recipe": "dynamic_int8", "op_types": ["MatMul", "Gather"]}]
INLINE, EXTERNAL = 1 << 30, 1000  # bytes from which the weights go into a file of their own
CHAINS: dict[str, tuple[Any, list[Any], int]] = {
    "bert-dynamic": (architectures.bert, [SIMPLIFY, DYNAMIC], INLINE),
    "bert-embedding": (architectures.bert, [["simplify", {"fusions": True}], EMBEDDING], INLINE),
    "bert-equalized": (architectures.bert, [SIMPLIFY, ["equalize", {}], STATIC], INLINE),
    "cnn-entropy": (architectures.depthwise_cnn, [SIMPLIFY, ENTROPY], INLINE),
    "gpt2-sensitivity": (architectures.gpt2, [SIMPLIFY, ["sensitivity", {}]], INLINE),
    "external-dynamic": (architectures.bert, [DYNAMIC], EXTERNAL),
    "external-static": (architectures.bert, [STATIC], EXTERNAL),
}


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, str]]]:
    """By hash seed and chain: file → digest."""
    root = tmp_path_factory.mktemp("chains")
    for name, (make, _, limit) in CHAINS.items():
        model = make()
        data = dataset(model)
        path = root / name / "model" / "model.onnx"
        path.parent.mkdir(parents=True)
        (root / name / "calibration").mkdir()
        np.savez(root / name / "calibration" / "data.npz", **data)
        external = limit == EXTERNAL
        onnx.save_model(
            model,
            path,
            save_as_external_data=external,
            location="model.onnx.data" if external else None,
            size_threshold=0,
        )
    chains = json.dumps({name: [steps, limit] for name, (_, steps, limit) in CHAINS.items()})
    here = str(Path(__file__).resolve().parents[2])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(root), chains, f"seed{seed}"],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": here},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    found = []
    for process in running:
        out, _ = process.communicate()
        assert process.returncode == 0
        found.append(json.loads(out.splitlines()[-1]))
    return found


@pytest.mark.parametrize("chain", list(CHAINS))
def test_the_same_bytes_with_another_hash_seed(chain: str, digests: list[dict[str, dict[str, str]]]) -> None:
    first, second = (d[chain] for d in digests)
    assert first == second
    assert len(first) >= len(CHAINS[chain][1])
    assert ("0/model.onnx.data" in first) is chain.startswith("external")
