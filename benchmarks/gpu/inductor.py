"""The backend inductor-cuda beside torch itself: the engine that a job would ship, built from a `.pt2`.

    python benchmarks/gpu/inductor.py --results figures               # every model, then the tables
    python benchmarks/gpu/inductor.py --results figures --only vit --batch 32 --engines fp16 fp8
    python benchmarks/gpu/inductor.py --results figures --tables      # of what was measured before

Needs torch with CUDA and a C++ compiler, no ONNX Runtime. An engine is built once per model, from a program whose batch
size is dynamic; torch's contenders are made for each batch size, in float16: eager, `torch.compile` in its default mode
and by `max-autotune`, all captured in a CUDA graph, and with weights in channels-last layout where there are
convolutions. All of a batch size are measured in turns in one process, one model on a GPU at a time, while nothing is
built there; with several GPUs (`--gpus`) models are measured side by side, each on one of its own. "GPU ms" is the
median of the time between two CUDA events around one call with its inputs on the GPU, "ms" that of the wall clock until
the GPU is done.

What is measured is written after each batch size; what `--results` holds already is not measured again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import models
from tables import tables
from timing import cosine

from workers import installation
from workers.artifacts import EXPORTED_PROGRAM, PROGRAM_FILE
from workers.backends.inductor import InductorCudaBackend
from workers.graph import program_ranges
from workers.graph.exported_program import ProgramFolder
from workers.graph.interface import Interface
from workers.installation import KEY_BYTES, Installation
from workers.kernel import Reporter, TensorSpec

ROUNDS = 10
CALIBRATION = 32
MOST = 64  # the largest batch of the program
ENGINES: dict[str, dict[str, Any]] = {  # name → options of the build; fp8: of a calibrated program
    "fp16": {"precision": "fp16"},
    "fp8": {"precision": "fp16"},
}
Arrays = dict[str, np.ndarray[Any, Any]]
Call = Callable[[], Any]
Json = dict[str, Any]


class Said(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None:
        say(f"    note: {message} {facts or ''}"[:300])


_BEGAN = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


def program(name: str, folder: Path) -> Path:
    """The model as a user uploads it: exported with a dynamic batch, and what its inputs and outputs are called."""
    net, feeds = models.make(name), models.MODELS[name].samples(2, np.random.default_rng(1))
    batch = torch.export.Dim("batch", min=1, max=MOST)
    args = tuple(torch.from_numpy(a) for a in feeds.values())
    with torch.no_grad():
        exported = torch.export.export(net, args, dynamic_shapes=tuple({0: batch} for _ in args))
        found = models.MODELS[name].named(net(*args))
    folder.mkdir(parents=True)
    torch.export.save(exported, str(folder / PROGRAM_FILE))
    inputs = tuple(TensorSpec(n, str(a.dtype), ("batch", *a.shape[1:])) for n, a in feeds.items())
    outputs = tuple(TensorSpec(n, str(a.dtype), ("batch", *a.shape[1:])) for n, a in found.items())
    Interface(inputs, outputs).write(folder)
    return folder


def captured(call: Call) -> Call:
    """`call` as a CUDA graph; its input and output tensors stay where they are."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own has no annotation
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def torch_contender(name: str, feeds: Arrays, how: str) -> tuple[Call, Arrays]:
    """`how`: `eager`, `compiled` or `max-autotune`, and `channels_last`."""
    module: Any = models.make(name).cuda().half().eval()
    if "channels_last" in how:
        module = module.to(memory_format=torch.channels_last)
    if "eager" not in how:
        module = torch.compile(module, mode="max-autotune-no-cudagraphs" if "max-autotune" in how else None)
    placed = [t.half() if t.is_floating_point() else t for t in (torch.from_numpy(a).cuda() for a in feeds.values())]
    with torch.inference_mode():
        found = models.MODELS[name].named(module(*placed))
        replay = captured(lambda: module(*placed))

    def call(_kept: Any = (module, placed)) -> None:  # the graph holds addresses, not tensors
        replay()
        torch.cuda.synchronize()

    return call, found


def timed(contenders: dict[str, Call], seconds: float) -> dict[str, Json]:
    """All in turns, `ROUNDS` times, `seconds` each in all."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # likewise
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    gpu: dict[str, list[float]] = {name: [] for name in contenders}
    rng = np.random.default_rng(0)
    for turn in range(ROUNDS + 1):  # the first warms up
        for name in rng.permutation([*contenders]):
            call, until = contenders[name], time.perf_counter() + seconds / ROUNDS
            while time.perf_counter() < until:
                start = time.perf_counter()
                begin.record()
                call()
                end.record()
                end.synchronize()
                if turn:
                    wall[name].append(1e3 * (time.perf_counter() - start))
                    gpu[name].append(begin.elapsed_time(end))
    return {
        name: {"ms": round(float(np.median(wall[name])), 4), "gpu_ms": round(float(np.median(gpu[name])), 4)}
        for name in contenders
    }


class Measured:
    """One model on this process's GPU; `path`: what was found, written after each step."""

    def __init__(self, name: str, path: Path, arguments: argparse.Namespace, root: Path) -> None:
        self.name, self.path, self.arguments, self.root = name, path, arguments, root
        self.model, self.backend = models.MODELS[name], InductorCudaBackend()
        empty: Json = {"built": {}, "batches": {}, "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
        self.result: Json = json.loads(path.read_text()) if path.exists() else empty
        self.engines: dict[str, tuple[Path, Json]] = {}

    def run(self) -> None:
        batches = [b for b in self.arguments.batch if not self._known(b)]
        if not batches:
            return
        with self._gpu(fcntl.LOCK_SH):
            source = program(self.name, self.root / "model")
            for label in self.arguments.engines:
                self._tried(label, lambda label=label: self._build(label, source))
        with self._gpu(fcntl.LOCK_EX):
            for batch in batches:
                self._measure(batch)

    @contextmanager
    def _gpu(self, how: int) -> Iterator[None]:
        """Shared by those that build, and for one alone that measures."""
        with (self.path.parent / f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}.lock").open("w") as lock:
            fcntl.flock(lock, how)
            yield

    def _known(self, batch: int) -> bool:
        wanted = {*self.arguments.engines, *(f"torch {how}" for how in self._torch(batch))}
        return wanted <= {*self.result["batches"].get(str(batch), {})}

    def _torch(self, batch: int) -> list[str]:
        ways = [w for w in self.arguments.torch if w != "max-autotune" or batch in self.arguments.autotune_at]
        return [*ways, *(f"{w} channels_last" for w in ways if w != "eager")] if self.model.convolutions else ways

    def _build(self, label: str, source: Path) -> None:
        options = ENGINES[label] | ({"channels_last": True} if self.model.convolutions else {})
        if label == "fp8":
            samples = self.model.samples(CALIBRATION, np.random.default_rng(11))
            found = program_ranges.observed(ProgramFolder.read(source), [samples], "cuda")
            source = shutil.copytree(source, self.root / "calibrated")
            program_ranges.write(source, found)
        engine = self.root / f"engine-{len(self.engines)}"
        engine.mkdir()
        start = time.perf_counter()
        built = self.backend.build(source, engine, options, Said(), EXPORTED_PROGRAM)
        size = sum(p.stat().st_size for p in engine.iterdir())
        took = round(time.perf_counter() - start, 1)
        self.result["built"][label] = {"form": built["form"], "build_s": took, "mb": round(size / 1e6)}
        self.engines[label] = engine, built["runtime"]
        say(f"{self.name}: {label} {self.result['built'][label]}")

    def _engine(self, label: str, feeds: Arrays) -> tuple[Call, Arrays, Json]:
        engine, runtime = self.engines[label]
        start = time.perf_counter()
        session = self.backend.load(engine, {**runtime, "cuda_graph": True})
        loaded = time.perf_counter()
        answers = session.run(feeds)
        first = time.perf_counter()
        facts = {"load_s": round(loaded - start, 2), "first_call_s": round(first - loaded, 2)}
        return session.bind(feeds), dict(answers), facts

    def _measure(self, batch: int) -> None:
        feeds = self.model.samples(batch, np.random.default_rng(99))
        with torch.inference_mode():
            net = models.make(self.name).cuda()
            wanted = self.model.named(net(*(torch.from_numpy(a).cuda() for a in feeds.values())))
            del net
        calls: dict[str, Call] = {}
        seen: dict[str, Json] = {}

        def enter(label: str, make: Callable[[], tuple[Any, ...]]) -> None:
            start = time.perf_counter()
            call, answers, *more = make()
            calls[label] = call
            ready = {"ready_s": round(time.perf_counter() - start, 1)}
            seen[label] = {"cosine": cosine(wanted, answers), **ready, **(more[0] if more else {})}

        for label in self.engines:
            self._tried(label, lambda label=label: enter(label, lambda: self._engine(label, feeds)))
        for how in self._torch(batch):
            label = f"torch {how}"
            self._tried(
                label, lambda how=how, label=label: enter(label, lambda: torch_contender(self.name, feeds, how))
            )
        figures = timed(calls, self.arguments.seconds)
        kept = self.result["batches"].setdefault(str(batch), {})
        kept |= {label: {**figures[label], **seen[label]} for label in calls}
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")
        say(f"{self.name} b={batch}: { ({k: (v['gpu_ms'], v['cosine']) for k, v in kept.items()}) }")
        torch._dynamo.reset()
        torch.cuda.empty_cache()

    def _tried(self, label: str, work: Callable[[], Any]) -> None:
        """What fails leaves the rest to go on, and says so."""
        try:
            work()
        except Exception as error:
            self.result.setdefault("failed", {})[label] = (
                f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            )
            say(f"{self.name}: {label}: {self.result['failed'][label]}")


def alone(name: str, arguments: argparse.Namespace) -> None:
    with (
        installation.using(Installation(b"k" * KEY_BYTES)),
        tempfile.TemporaryDirectory(prefix="anneal-gpu-") as folder,
    ):
        Measured(name, arguments.results / f"{name}.json", arguments, Path(folder)).run()


def spread(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Each model in a process of its own, two on a GPU: what they build is built side by side."""
    free: Queue[str] = Queue()
    for gpu in (*range(arguments.gpus), *range(arguments.gpus)):
        free.put(str(gpu))

    def one(name: str) -> None:
        gpu = free.get()
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", name]
        try:
            subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}, check=False)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(2 * arguments.gpus) as pool:
        list(pool.map(one, names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder: a JSON file for each model")
    parser.add_argument("--only", choices=list(models.MODELS), nargs="+", default=list(models.MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--engines", choices=list(ENGINES), nargs="+", default=["fp16"])
    parser.add_argument(
        "--torch", nargs="*", choices=["eager", "compiled", "max-autotune"], default=["eager", "compiled"]
    )
    parser.add_argument("--autotune-at", type=int, nargs="*", default=[1, 8, 32], help="batch sizes of max-autotune")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and batch size")
    parser.add_argument("--gpus", type=int, default=1, help="how many to spread the models over")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what was measured")
    parser.add_argument("--alone", choices=list(models.MODELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.tables:
        if not torch.cuda.is_available():
            print("There is no NVIDIA GPU here, or torch has no CUDA: nothing was measured.")
            return 0
        arguments.results.mkdir(parents=True, exist_ok=True)
        if arguments.alone:
            alone(arguments.alone, arguments)
            return 0
        spread(arguments.only, arguments)
    print(tables(arguments.results, {name: model.label for name, model in models.MODELS.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
