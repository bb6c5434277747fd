"""The downloaded engine beside the original, measured as the job measures: each in a process of its own, called as a
user calls (`infer.py`'s `run`, ONNX Runtime's `session.run`), in turns, every round another pair of windows.

    python examples/digits/beside.py FOLDER     # the unpacked bundle
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROUNDS = 7
WINDOW_S = 0.035
_UNCOUNTED = 10  # calls at the start of a window: caches and threads come back
_INPUTS = 16
_REST_STEP_S, _LONGEST_REST_S, _AT_REST = 0.004, 0.2, 0.25
_DRAWS = 2000
Run = Callable[[dict[str, Any]], dict[str, Any]]


class EngineFailed(Exception):
    """A process that runs an engine ended, or what it answers is not what was promised."""


@dataclass(frozen=True)
class Beside:
    """`p50_ms`: of the original and the engine. `speedup`: original over engine, and its 95 % interval."""

    p50_ms: tuple[float, float]
    speedup: float
    low: float
    high: float


class Process:
    """One engine in a process of its own; `source`: the bundle's folder, or the original model."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", str(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(what), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            raise EngineFailed(f"the engine's process ended with {self._process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise EngineFailed(found["error"])
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written to a process that is gone
                if pipe is not None:
                    pipe.close()


def beside(original: Process, engine: Process, batch: int) -> Beside:
    """Both at one batch size; the first round warms up. The speed-up is the pseudo-median of the rounds' ratios, its
    interval by bootstrap over the rounds, as in docs/measurement.md."""
    rounds = []
    for turn in range(ROUNDS + 1):
        pair = (original, engine) if turn % 2 else (engine, original)
        p50 = {process: process.ask(batch=batch, seconds=WINDOW_S)["p50_ms"] for process in pair}
        rounds.append((p50[original], p50[engine]))
    counted = np.array(rounds[1:])
    logs = np.log(counted[:, 0] / counted[:, 1])
    draws = np.random.default_rng(0).integers(0, len(logs), size=(_DRAWS, len(logs)))
    low, high = np.quantile([_pseudo_median(logs[draw]) for draw in draws], (0.0125, 0.9875))  # few rounds: wider tails
    p50_ms = np.median(counted, axis=0)
    found = [float(np.exp(x)) for x in (_pseudo_median(logs), low, high)]
    return Beside((float(p50_ms[0]), float(p50_ms[1])), *found)


def _pseudo_median(values: Any) -> float:
    first, second = np.triu_indices(len(values))
    return float(np.median((values[first] + values[second]) / 2))


# In the process


def load(source: Path) -> Run:
    """The bundle's engine by its own `infer.py`, with the options it was measured with; the original as its owner would
    run it."""
    if source.is_dir():
        spec = importlib.util.spec_from_file_location("infer", source / "infer.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _names, run = module.load()
        loaded: Run = run
        return loaded
    import onnxruntime as ort

    session = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def accuracy(run: Run, images: Any, labels: Any) -> float:
    """Percent of the images whose largest logit is the label's; batches of 64."""
    right = 0
    for start in range(0, len(images), 64):
        (logits,) = run({"image": images[start : start + 64]}).values()
        if not np.isfinite(logits).all():
            raise EngineFailed("an output is not finite")
        right += int((logits.argmax(1) == labels[start : start + 64]).sum())
    return 100.0 * right / len(images)


def window(run: Run, feeds: Sequence[dict[str, Any]], seconds: float) -> float:
    """p50 in ms of one window; then until the library's threads, which wait for work in a busy loop, sleep."""
    took: list[float] = []
    begun = time.perf_counter()
    calls = 0
    while calls < _UNCOUNTED + 3 or time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        run(feeds[calls % len(feeds)])
        took.append(time.perf_counter() - start)
        calls += 1
    for _ in range(int(_LONGEST_REST_S / _REST_STEP_S)):
        busy, start = time.process_time(), time.perf_counter()
        time.sleep(_REST_STEP_S)
        if time.process_time() - busy < _AT_REST * (time.perf_counter() - start):
            break
    return 1000 * float(np.median(took[_UNCOUNTED:]))


def serve(source: Path) -> None:
    """Answer one JSON line for each that comes, until there are no more."""
    with np.load(HERE / "validation.npz", allow_pickle=False) as arrays:
        images, labels = arrays["image"], arrays["labels"]
    run = load(source)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "batch" not in asked:
                answer: dict[str, Any] = {"accuracy": accuracy(run, images, labels), "samples": len(images)}
            else:
                n = asked["batch"]
                feeds = [{"image": np.ascontiguousarray(images[i * n : (i + 1) * n])} for i in range(_INPUTS)]
                answer = {"p50_ms": window(run, feeds, asked["seconds"])}
        except Exception as error:  # whatever the engine's library raises: the demo tells it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
        return 0
    processes = [Process(HERE / "model.onnx"), Process(Path(sys.argv[1]))]
    try:
        for batch in (1, 8):
            found = beside(processes[0], processes[1], batch)
            print(f"batch {batch}: {found.speedup:.2f}x [{found.low:.2f}, {found.high:.2f}], p50 {found.p50_ms} ms")
    finally:
        for process in processes:
            process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
