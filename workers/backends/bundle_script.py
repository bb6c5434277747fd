"""The `infer.py` that goes into the bundle: what is the same for every library. Needs nothing of this package."""

from __future__ import annotations

import json

from workers.rounding import TOLERANCES

HURRY = ("--repeat", "1")  # of `infer_script`'s (`kernel.Backend.script_hurry`): no runs but one to tell the latency
# Of every backend's `infer.py`: it takes `np`, `json`, `sys` and `HERE`.
CHECK = '''
# How far a number may be from the one where the engine was built, over the largest one of its output: another machine
# or version sums in another order, and the lower the precision, the more that shows. Integers are equal.
TOLERANCES = __TOLERANCES__


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest one of two arrays; infinite where they cannot be compared."""
    if found.shape != wanted.shape:
        return float("inf")
    if wanted.dtype.kind not in "fiuV":
        return 0.0 if np.array_equal(found.astype(wanted.dtype), wanted) else float("inf")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0))


def about() -> dict:
    """What the manifest says of the engine."""
    manifest = HERE / "manifest.json"
    return json.loads(manifest.read_text(encoding="utf-8")).get("engine", {}) if manifest.exists() else {}


def as_expected(outputs: dict, file: str = "expected_output.npz") -> bool:
    """Whether the engine answers here as it did where it was built, as far as its precision carries (of several
    engines, the lowest one's)."""
    if not (HERE / file).exists():
        return True
    precision = about().get("precision", "fp32")
    tolerance = max(TOLERANCES.get(part, 1e-3) for part in precision.split("+"))
    worst, same = 0.0, True
    with np.load(HERE / file, allow_pickle=False) as expected:
        for name in expected.files:
            found, wanted, allowed = np.asarray(outputs.get(name, "missing")), expected[name], 0.0
            if wanted.dtype.kind == "V" and found.dtype.itemsize == wanted.dtype.itemsize:
                wanted = wanted.view(found.dtype)  # an .npz does not know bfloat16
            apart = difference(found, wanted) if name in outputs else float("inf")
            if wanted.dtype.kind in "fV" and apart < float("inf"):
                sizes = np.abs(wanted.astype(np.float64))
                allowed = tolerance * float(sizes[np.isfinite(sizes)].max(initial=0.0))
            worst = max(worst, apart)
            if apart > allowed:
                same = False
                print(f"output {name} differs by {apart:.3g}, allowed is {allowed:.3g} in {precision}", file=sys.stderr)
    print(f"max abs difference to {file}: {worst:.3g}")
    print(("the same" if same else "NOT the same") + f" as where it was built, as far as {precision} carries")
    return same
'''.replace("__TOLERANCES__", json.dumps(TOLERANCES))

# Likewise, after its `load`.
REFUSAL = '''
class ShapeRefused(ValueError):
    """An input of a size at which this engine was found not to answer as the original does."""


def refuse(feeds: dict, accepts: dict) -> None:
    """Raise for sizes that the manifest's `accepts` does not allow: of an input, for each axis [least, most], or null
    where any size will do."""
    for name, bounds in accepts.items():
        for axis, bound in enumerate(bounds):
            size = np.shape(feeds[name])[axis]
            least, most = bound or (None, None)
            if (least is not None and size < least) or (most is not None and size > most):
                allowed = f"at least {least}" if most is None else f"{least or 0} to {most}"
                raise ShapeRefused(
                    f"input {name} has size {size} on axis {axis}; this engine takes {allowed}: at other sizes it was "
                    "not seen to answer as the original does, which does take them"
                )


def limited(load):
    """`load`, with a `run` that refuses such sizes."""

    def loaded(threads=None):
        names, run = load() if threads is None else load(threads)
        accepts = about().get("accepts") or {}

        def checked(feeds):
            refuse(feeds, accepts)
            return run(feeds)

        return names, checked if accepts else run

    loaded.__wrapped__ = load  # who asks for its parameters sees those: an engine may take no number of threads
    return loaded


load = limited(load)


def guarded(main):
    """The exit code of `main`; a refused input is told in one line."""
    try:
        return main()
    except ShapeRefused as refused:
        print(refused, file=sys.stderr)
        return 2
'''

COMMON = f"{CHECK.strip()}\n\n\n{REFUSAL.strip()}"

_TEMPLATE = '''#!/usr/bin/env python3
"""Run the optimized model beside this file on the arrays of an .npz.

    python infer.py [INPUT.npz] [OUTPUT.npz]

INPUT.npz holds one array per model input (default: sample_input.npz beside this file). The outputs are written to
OUTPUT.npz (default: output.npz in the current folder). Without an INPUT, the outputs are also compared with
expected_output.npz, where that stands beside this file; the exit code is 1 where they differ by more than rounding.

Needs: numpy, __NEEDS__.
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


__CHECK__


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

    if args.input is not None:
        return 0
    same = as_expected(outputs)
    for sample in sorted(HERE.glob("sample_input_*.npz")):  # of a bundle with several engines, one for each further
        feeds = read(sample)
        same = as_expected(run(feeds), sample.name.replace("sample_input", "expected_output")) and same
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(guarded(main))
'''


def infer_script(*, library: str, imports: str, loader: str, version: str | None = None) -> str:
    """Source of `infer.py`. `library`, `version`: what has to be installed, for the reader. `loader` defines
    `load(threads=None) -> (names of the inputs, run)`, where `run(feeds)` returns all outputs by name, and `threads`
    compute where it is not as many as were measured; it may use what `imports` brings, `np`, `json`, `sys`, `Path`, and
    `HERE`, the engine's folder."""
    parts = {
        "NEEDS": f"{library} ({version} was measured)" if version else library,
        "IMPORTS": imports,
        "LOADER": loader.strip(),
        "CHECK": COMMON,
    }
    text = _TEMPLATE
    for name, part in parts.items():
        text = text.replace(f"__{name}__", part)
    return text
