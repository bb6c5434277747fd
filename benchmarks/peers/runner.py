"""One engine, warm in a process of its own: loaded, fed with the validation data, timed call by call.

`Runner` is the parent's handle. The same loop times every engine, whoever made it; ONNX Runtime through an I/O binding
and OpenVINO through an infer request whose tensors are set once, so that no copy of ours is in the time.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]

DISTINCT = 8  # inputs in turn: never one tensor
ACCURACY_BATCH = 8
WARM_WINDOW_S = 0.05
CALL_LIMIT_S = 900.0
SETTLE_CALLS = 3
REST_STEP_S, REST_STEPS = 0.004, 50
_PR_SET_PDEATHSIG = 1


class EngineFailed(Exception):
    """The engine does not load, does not run, or its process ended."""


# In the child


class OrtEngine:
    def __init__(self, session: Any) -> None:
        self._session = session
        self.inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]
        self.facts: dict[str, Any] = {}

    @classmethod
    def load(cls, spec: Mapping[str, Any]) -> OrtEngine:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        return cls(ort.InferenceSession(spec["file"], options, providers=["CPUExecutionProvider"]))

    def run(self, feeds: Arrays) -> Arrays:
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        import onnxruntime as ort

        binding = self._session.io_binding()
        values = {n: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a), "cpu", 0) for n, a in feeds.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu")
        run = self._session.run_with_iobinding
        return lambda _kept=values: run(binding)  # type: ignore[misc]


class OpenVinoEngine:
    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self.inputs = [port.get_any_name() for port in compiled.inputs]
        self._request = compiled.create_infer_request()
        self.facts = {}
        for name in ("INFERENCE_PRECISION_HINT", "NUM_STREAMS", "INFERENCE_NUM_THREADS", "EXECUTION_MODE_HINT"):
            with contextlib.suppress(RuntimeError):
                value = compiled.get_property(name)
                self.facts[name] = value.get_type_name() if hasattr(value, "get_type_name") else str(value)

    @classmethod
    def load(cls, spec: Mapping[str, Any]) -> OpenVinoEngine:
        import openvino as ov

        core, path = ov.Core(), spec["file"]
        model = ov.convert_model(path) if path.endswith(".onnx") else core.read_model(path)
        return cls(core.compile_model(model, "CPU", dict(spec.get("config", {}))))

    def run(self, feeds: Arrays) -> Arrays:
        found = self._request.infer(feeds)
        # A tensor may have several names; the original's is one of them.
        return {name: np.array(value) for port, value in found.items() for name in port.get_names()}

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        import openvino as ov

        request = self._compiled.create_infer_request()
        kept = {n: ov.Tensor(np.ascontiguousarray(a), shared_memory=True) for n, a in feeds.items()}
        for name, tensor in kept.items():
            request.set_tensor(name, tensor)
        return lambda _kept=kept: request.infer(share_inputs=True, share_outputs=True)  # type: ignore[misc]


class ByBatch:
    """Several engines of one bundle, of which each call goes to the one for its batch size, as its `infer.py` does."""

    def __init__(self, engines: Sequence[OrtEngine | OpenVinoEngine], choice: Mapping[str, Any]) -> None:
        self._engines, self._name, self._axis = engines, choice["input"], choice["axis"]
        self._most = [engine["most"] for engine in choice["engines"]]
        self.inputs = engines[0].inputs
        self.facts = {str(most): engine.facts for most, engine in zip(self._most, engines, strict=True)}

    def _chosen(self, feeds: Arrays) -> OrtEngine | OpenVinoEngine:
        size = feeds[self._name].shape[self._axis]
        return next(e for e, most in zip(self._engines, self._most, strict=True) if most is None or size <= most)

    def run(self, feeds: Arrays) -> Arrays:
        return self._chosen(feeds).run(feeds)

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        return self._chosen(feeds).bind(feeds)


def watch_onnxruntime(opened: list[Any]) -> None:
    import onnxruntime as ort

    real = ort.InferenceSession

    class Watched(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(OrtEngine(self))

    ort.InferenceSession = Watched


def watch_openvino(opened: list[Any]) -> None:
    import openvino as ov

    compile_model = ov.Core.compile_model

    def watched(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_model(*args, **kwargs)
        opened.append(OpenVinoEngine(compiled))
        return compiled

    ov.Core.compile_model = watched


WATCHED = {"onnxruntime": watch_onnxruntime, "openvino": watch_openvino}


def load_bundle(spec: Mapping[str, Any]) -> OrtEngine | OpenVinoEngine | ByBatch:
    """What the bundle's own `infer.py` opens, with the options that it gives: the delivered bytes as delivered."""
    folder = Path(spec["file"])
    choice = (spec["facts"].get("runtime") or {}) if spec["backend"] not in WATCHED else {}
    opened: list[Any] = []
    for backend in {e["backend"] for e in choice.get("engines", ())} or {spec["backend"]}:
        if backend not in WATCHED:
            raise EngineFailed(f"no runner for the backend {backend!r}")
        WATCHED[backend](opened)
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        sys.argv = ["infer.py", str(folder / "sample_input.npz"), str(Path(out) / "out.npz"), "--repeat", "1"]
        try:
            runpy.run_path(str(folder / "infer.py"), run_name="__main__")
        except SystemExit as end:
            if end.code not in (None, 0):
                raise EngineFailed(f"infer.py ended with {end.code}: {said.getvalue()[-300:]}") from None
    if len(opened) < max(len(choice.get("engines", ())), 1):
        raise EngineFailed("infer.py opened no engine")
    return ByBatch(opened, choice) if choice else opened[-1]


def rows(array: Array, axis: int | None, picks: Any) -> Array:
    """These samples of an array, which lie along this axis; the whole of it where there is none."""
    return array if axis is None else np.ascontiguousarray(np.take(array, picks, axis))


LOADERS: dict[str, Callable[[Mapping[str, Any]], OrtEngine | OpenVinoEngine | ByBatch]] = {
    "onnxruntime": OrtEngine.load,
    "openvino": OpenVinoEngine.load,
    "bundle": load_bundle,
}


class Child:
    """Answers the parent's commands."""

    def __init__(self, spec: Mapping[str, Any], data: str, axes: Mapping[str, int | None]) -> None:
        with np.load(data) as arrays:
            self._data = {n: arrays[n] for n in arrays.files if n != "labels"}
        self._axes = {n: axes.get(n, 0) for n in self._data}
        self._count = next(self._data[n].shape[a] for n, a in self._axes.items() if a is not None)
        self._spec = spec
        self._calls: list[Callable[[], Any]] = []
        self._next = 0

    def load(self) -> dict[str, Any]:
        start = time.perf_counter()
        self._engine = LOADERS[self._spec["kind"]](self._spec)
        self._engine.facts["load_s"] = round(time.perf_counter() - start, 3)
        return self._engine.facts

    def outputs(self, path: str) -> None:
        """All outputs on all of the validation data, to an .npz."""
        parts: dict[str, list[Array]] = {}
        for start in range(0, self._count, ACCURACY_BATCH):
            feeds = self._feeds(np.arange(start, min(start + ACCURACY_BATCH, self._count)))
            for name, value in self._engine.run(feeds).items():
                parts.setdefault(name, []).append(np.asarray(value))
        np.savez(path, **{n: np.concatenate(p) for n, p in parts.items()})  # type: ignore[arg-type]

    def _feeds(self, picks: Array) -> Arrays:
        return {n: rows(self._data[n], self._axes[n], picks) for n in self._engine.inputs}

    def prepare(self, batch: int) -> None:
        step = max(1, self._count // DISTINCT)
        picks = [(i * step + np.arange(batch)) % self._count for i in range(DISTINCT)]
        self._calls = [self._engine.bind(self._feeds(p)) for p in picks]
        self._next = 0
        gc.collect()
        gc.freeze()
        gc.disable()

    def warm_up(self, cap_s: float) -> float:
        """Until three windows agree within 10 %; answers the last one's median, in seconds."""
        medians: list[float] = []
        start = time.perf_counter()
        while True:
            medians.append(float(np.median(self._timed(WARM_WINDOW_S, 1))) / 1e9)
            last = medians[-3:]
            if (len(last) == 3 and max(last) <= 1.1 * min(last)) or time.perf_counter() - start > cap_s:
                return medians[-1]

    def window(self, seconds: float, calls: int) -> Array:
        for _ in range(SETTLE_CALLS):  # caches and threads come back after the others' turns
            self._calls[self._next]()
        found = self._timed(seconds, calls)
        self._rest()
        return found

    def _rest(self) -> None:
        """Until its threads sleep: those of ONNX Runtime wait in a busy loop for 40 ms, in the next engine's turn."""
        for _ in range(REST_STEPS):
            busy = time.process_time()
            time.sleep(REST_STEP_S)
            if time.process_time() - busy < REST_STEP_S / 4:
                return

    def _timed(self, seconds: float, least: int) -> Array:
        calls, i, clock = self._calls, self._next, time.perf_counter_ns
        found: list[int] = []
        duration, begin = int(seconds * 1e9), clock()
        end = begin
        while end - begin < duration or len(found) < least:
            call = calls[i]
            start = clock()
            call()
            end = clock()
            found.append(end - start)
            i = (i + 1) % DISTINCT
        self._next = i
        return np.array(found, np.int64)


def serve(conn: Connection, spec: Mapping[str, Any], data: str, axes: Mapping[str, int | None]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = Child(spec, data, axes)
    with contextlib.suppress(EOFError, OSError):
        while True:
            command, args = conn.recv()
            try:
                conn.send((True, getattr(child, command)(*args)))
            except Exception as error:  # whatever a library raises is the peer's figure
                conn.send((False, f"{type(error).__name__}: {error}"[:500]))


# In the parent


class Runner:
    """A started engine; a context manager. Every call raises EngineFailed where the engine fails."""

    def __init__(self, name: str, spec: Mapping[str, Any], data: Path, axes: Mapping[str, int | None]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a clean process: no library of another engine in it
        self._conn, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, dict(spec), str(data), dict(axes)), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._conn.close()
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()

    def load(self) -> dict[str, Any]:
        facts: dict[str, Any] = self._call("load")
        return facts

    def outputs(self, path: Path) -> Arrays:
        self._call("outputs", str(path))
        with np.load(path) as arrays:
            return {n: arrays[n] for n in arrays.files}

    def prepare(self, batch: int) -> None:
        self._call("prepare", batch)

    def warm_up(self, cap_s: float) -> float:
        found: float = self._call("warm_up", cap_s)
        return found

    def window(self, seconds: float, calls: int) -> Array:
        """Latencies in ns."""
        found: Array = self._call("window", seconds, calls)
        return found

    def _call(self, command: str, *args: Any) -> Any:
        try:
            self._conn.send((command, args))
            if not self._conn.poll(CALL_LIMIT_S):
                raise EngineFailed(f"no answer to {command!r} within {CALL_LIMIT_S:.0f} s")
            ok, value = self._conn.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise EngineFailed(f"the process ended during {command!r} ({self._process.exitcode})") from None
        if not ok:
            raise EngineFailed(value)
        return value
