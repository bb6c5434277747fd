"""The `infer.py` that goes into the bundle of an engine for ONNX Runtime's CUDA provider."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends.bundle_script import COMMON

_TEMPLATE = '''#!/usr/bin/env python3
"""Run the optimized model beside this file on an NVIDIA GPU, on the arrays of an .npz.

    python infer.py [INPUT.npz] [OUTPUT.npz]

INPUT.npz holds one array per model input (default: sample_input.npz beside this file). The outputs are written to
OUTPUT.npz (default: output.npz in the current folder). Without an INPUT, the outputs are also compared with
expected_output.npz, where that stands beside this file; the exit code is 1 where they differ by more than rounding.

Needs: numpy, onnxruntime-gpu (__VERSION__ was measured) with the CUDA libraries of its version.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent

# The options this engine was measured with; an empty object means ONNX Runtime's defaults.
RUNTIME = json.loads(r"""__RUNTIME__""")
PROVIDER_OPTIONS = json.loads(r"""__PROVIDER__""")


def make_session() -> ort.InferenceSession:
    ort.preload_dlls()  # CUDA's libraries from Python packages, where they are installed that way
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
    for key, value in RUNTIME.get("session_config", {}).items():
        options.add_session_config_entry(key, value)
    provider = ("CUDAExecutionProvider", PROVIDER_OPTIONS)
    session = ort.InferenceSession(str(HERE / "model.onnx"), options, providers=[provider])
    if session.get_providers()[0] != "CUDAExecutionProvider":
        sys.exit("the CUDA provider of ONNX Runtime could not be loaded; install onnxruntime-gpu and CUDA's libraries")
    session.disable_fallback()
    return session


def runner(session):
    """A function from arrays by name to outputs by name, which many threads may call."""
    options = ort.RunOptions()
    # Sessions with CUDA graphs serve one call at a time.
    alone = threading.Lock() if RUNTIME.get("cuda_graph") else contextlib.nullcontext()
    if RUNTIME.get("cuda_graph"):
        options.add_run_config_entry("gpu_graph_id", "-1")  # neither captured nor replayed
    outputs = [item.name for item in session.get_outputs()]

    def run(feeds):
        with alone:
            return dict(zip(outputs, session.run(None, feeds, options)))

    return run


def load(threads=None):
    """Names of the inputs, and the function that `runner` makes. `threads` changes nothing: the work is not done by CPU
    threads."""
    session = make_session()
    return [item.name for item in session.get_inputs()], runner(session)


def bound_call(session, feeds, outputs):
    """One run on inputs that lie on the GPU; as a CUDA graph where the engine was measured as one. For one thread."""
    binding = session.io_binding()
    kept = []
    for name, array in feeds.items():
        kept.append(ort.OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), "cuda", 0))
        binding.bind_ortvalue_input(name, kept[-1])
    for name, array in outputs.items():
        kept.append(ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, "cuda", 0))
        binding.bind_ortvalue_output(name, kept[-1])
    options = ort.RunOptions()
    if RUNTIME.get("cuda_graph"):
        options.add_run_config_entry("gpu_graph_id", "1")
    call = lambda kept=kept: session.run_with_iobinding(binding, options)
    for _ in range(3):
        call()
    return call


def read(path: Path) -> dict:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


__CHECK__


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
    refuse(feeds, about().get("accepts") or {})
    outputs = runner(session)(feeds)

    for name, array in feeds.items():
        print(f"input  {name}: {array.dtype} {list(array.shape)}")
    for name, array in outputs.items():
        print(f"output {name}: {array.dtype} {list(array.shape)}")
    np.savez(args.output, **outputs)
    print(f"wrote {args.output}")

    call = bound_call(session, feeds, outputs)
    times = []
    for _ in range(max(1, args.repeat)):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    print(f"latency p50 on the GPU, without copies: {1000 * float(np.median(times)):.3f} ms over {len(times)} runs")

    return 0 if args.input is not None or as_expected(outputs) else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
'''


def infer_script(runtime: Mapping[str, Any], provider_options: Mapping[str, str], version: str) -> str:
    """Source of `infer.py` for an engine with these options. `version`: ONNX Runtime's, for the reader."""

    def text(options: Mapping[str, Any]) -> str:
        return json.dumps(dict(options), indent=2, sort_keys=True, ensure_ascii=True)

    filled = (
        _TEMPLATE.replace("__CHECK__", COMMON).replace("__VERSION__", version).replace("__RUNTIME__", text(runtime))
    )
    return filled.replace("__PROVIDER__", text(provider_options))
