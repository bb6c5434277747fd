"""The `infer.py` that goes into the bundle of an ONNX Runtime engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TEMPLATE = '''#!/usr/bin/env python3
"""Run the optimized model beside this file on the arrays of an .npz.

    python infer.py [INPUT.npz] [OUTPUT.npz]

INPUT.npz holds one array per model input (default: sample_input.npz beside this file). The outputs are written to
OUTPUT.npz (default: output.npz in the current folder). Without an INPUT, the outputs are also compared with
expected_output.npz, where that stands beside this file.

Needs: numpy, onnxruntime (__VERSION__ was measured).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent

# The session options this engine was measured with; an empty object means ONNX Runtime's defaults.
RUNTIME = json.loads(r"""__RUNTIME__""")


def make_session() -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    if "graph_optimization_level" in RUNTIME:
        options.graph_optimization_level = levels[RUNTIME["graph_optimization_level"]]
    if "intra_op_num_threads" in RUNTIME:
        options.intra_op_num_threads = RUNTIME["intra_op_num_threads"]
    if "inter_op_num_threads" in RUNTIME:
        options.inter_op_num_threads = RUNTIME["inter_op_num_threads"]
    if RUNTIME.get("execution_mode") == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    if "allow_spinning" in RUNTIME:
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if RUNTIME["allow_spinning"] else "0")
    for key, value in RUNTIME.get("session_config", {}).items():
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])


def read(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def difference(a: np.ndarray, b: np.ndarray) -> float:
    if a.shape != b.shape:
        return float("inf")
    if a.size == 0:
        return 0.0
    return float(np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", nargs="?", type=Path, help=".npz with one array per model input")
    parser.add_argument("output", nargs="?", type=Path, default=Path("output.npz"), help="where the outputs go")
    parser.add_argument("--repeat", type=int, default=50, help="runs to take the latency from (default: 50)")
    args = parser.parse_args()

    session = make_session()
    names = [item.name for item in session.get_inputs()]
    arrays = read(args.input or HERE / "sample_input.npz")
    missing = [name for name in names if name not in arrays]
    if missing:
        print(f"missing inputs: {', '.join(missing)}; the model needs {', '.join(names)}", file=sys.stderr)
        return 2
    feeds = {name: arrays[name] for name in names}
    output_names = [item.name for item in session.get_outputs()]
    outputs = dict(zip(output_names, session.run(None, feeds)))

    for name, array in feeds.items():
        print(f"input  {name}: {array.dtype} {list(array.shape)}")
    for name, array in outputs.items():
        print(f"output {name}: {array.dtype} {list(array.shape)}")
    np.savez(args.output, **outputs)
    print(f"wrote {args.output}")

    times = []
    for _ in range(max(1, args.repeat)):
        start = time.perf_counter()
        session.run(None, feeds)
        times.append(time.perf_counter() - start)
    print(f"latency p50: {1000 * float(np.median(times)):.3f} ms over {len(times)} runs")

    expected = HERE / "expected_output.npz"
    if args.input is None and expected.exists():
        wanted = read(expected)
        worst = max((difference(outputs[n], wanted[n]) for n in wanted if n in outputs), default=float("inf"))
        print(f"max abs difference to expected_output.npz: {worst:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


def infer_script(runtime: Mapping[str, Any], version: str) -> str:
    """Source of `infer.py` for an engine with these session options. `version`: ONNX Runtime's, for the reader."""
    text = json.dumps(dict(runtime), indent=2, sort_keys=True, ensure_ascii=True)
    return _TEMPLATE.replace("__VERSION__", version).replace("__RUNTIME__", text)
