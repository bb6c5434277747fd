"""The `infer.py` that goes into the bundle: what is the same for every library. Needs nothing of this package."""

from __future__ import annotations

_TEMPLATE = '''#!/usr/bin/env python3
"""Run the optimized model beside this file on the arrays of an .npz.

    python infer.py [INPUT.npz] [OUTPUT.npz]

INPUT.npz holds one array per model input (default: sample_input.npz beside this file). The outputs are written to
OUTPUT.npz (default: output.npz in the current folder). Without an INPUT, the outputs are also compared with
expected_output.npz, where that stands beside this file.

Needs: numpy, __LIBRARY__ (__VERSION__ was measured).
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
__IMPORTS__

HERE = Path(__file__).resolve().parent

__LOADER__


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

    names, run = load()
    arrays = read(args.input or HERE / "sample_input.npz")
    missing = [name for name in names if name not in arrays]
    if missing:
        print(f"missing inputs: {', '.join(missing)}; the model needs {', '.join(names)}", file=sys.stderr)
        return 2
    feeds = {name: arrays[name] for name in names}
    outputs = run(feeds)

    for name, array in feeds.items():
        print(f"input  {name}: {array.dtype} {list(array.shape)}")
    for name, array in outputs.items():
        print(f"output {name}: {array.dtype} {list(array.shape)}")
    np.savez(args.output, **outputs)
    print(f"wrote {args.output}")

    times = []
    for _ in range(max(1, args.repeat)):
        start = time.perf_counter()
        run(feeds)
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


def infer_script(*, library: str, version: str, imports: str, loader: str) -> str:
    """Source of `infer.py`. `loader` defines `load() -> (names of the inputs, run)`, where `run(feeds)` returns all
    outputs by name; it may use what `imports` brings, `np`, `json`, `sys`, `Path`, and `HERE`, the engine's folder."""
    parts = {"LIBRARY": library, "VERSION": version, "IMPORTS": imports, "LOADER": loader.strip()}
    text = _TEMPLATE
    for name, part in parts.items():
        text = text.replace(f"__{name}__", part)
    return text
