"""What a job would pick on an NVIDIA GPU, beside everything that one tool alone offers there.

    python benchmarks/gpu/run.py --results figures               # every model, then the tables
    python benchmarks/gpu/run.py --results figures --only vit --batch 32 --lines inductor "torch compiled"
    python benchmarks/gpu/run.py --results figures --tables      # of what was measured before

Needs the `gpu` extra, torch with CUDA, onnxscript and a C++ compiler; what is missing is skipped, with its reason.
Contenders: ONNX Runtime's CUDA provider in every configuration, Inductor's engines in the layouts that a job tries (one
for all batch sizes) and with products in fp8, torch eager, compiled and by max-autotune (for each batch size, captured
in a CUDA graph, with weights in channels-last layout too where there are convolutions), TensorRT where it is installed.

Each is made ready in a process of its own, of a GPU's models side by side, first the service's engines (by `--in-turn`
one after the other); then, one model and batch size on a GPU at a time, max-autotune is made ready, which times kernels
by the hundred, and all are measured in turns, while nothing else works on that GPU. "GPU ms" is
the median of the time between two CUDA events around one call with its inputs on the GPU, "ms" that of the wall clock
until the GPU is done. "Pick" is the fastest of the service's engines by every other turn, compared with the others by
the rest of the turns.

What is measured is written after each batch size.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import models
from breakdown import parts
from contenders import ORT, TRT, Json, Line, serve
from models import say
from tables import tables
from timing import figures

from workers import hardware, kernel

ROUNDS = 10
_ENGINE_BATCH = 32  # what engines are laid out for, as a job would for these sizes
_SLOW = ("ORT int8 Q/DQ in fp32", "ORT int8 Q/DQ in fp16")  # no gain for sure: the provider has no such products
LINES = ("ort", "ort-int8", "inductor", "inductor-exported", "fp8", "torch eager fp32", "torch eager",
         "torch compiled", "torch max-autotune", "tensorrt")  # fmt: skip
_USUAL = ("ort", "inductor", "fp8", "torch eager", "torch compiled", "torch max-autotune", "tensorrt")


def lines_of(name: str, arguments: argparse.Namespace) -> list[Line]:
    """The processes of one model."""
    model, batches = models.MODELS[name], tuple(arguments.batch)
    found: list[Line] = []
    for asked in arguments.lines:
        if asked == "ort":
            labels = [label for label, graph, _ in ORT if label not in _SLOW and _known(name, graph, label)]
            found.append(Line("ort", "ort", batches, {}, tuple(labels)))
        elif asked == "ort-int8":
            found.append(Line(asked, "ort", batches, {}, _SLOW))
        elif asked == "inductor":
            for last in model.layouts:
                found.append(_engine("Inductor fp16", batches, {"channels_last": True} if last else {}))
        elif asked == "inductor-exported":  # as it was before engines were laid out for a batch size
            build = {"precision": "fp16", **({"channels_last": True} if model.layouts[0] else {})}
            found.append(Line("Inductor fp16, of the export's sizes", "inductor", batches, {"build": build}))
        elif asked == "fp8" and name in ("vit", "bert"):
            found.append(_engine("Inductor fp8", batches, {}, fp8=True))
        elif asked.startswith("torch"):
            how = asked.removeprefix("torch ")
            ways = [how, f"{how} channels_last"] if model.convolutions and "eager" not in how else [how]
            if how == "max-autotune":  # minutes, in a process for each batch size
                sizes = [(b,) for b in batches if {str(b), f"{name}:{b}"} & {*arguments.autotune_at}]
                options = {"how": ways[-1], "threads": max(2, len(os.sched_getaffinity(0)) // arguments.gpus)}
                found += [Line(f"torch {ways[-1]}", "torch", size, options) for size in sizes]
            else:
                found += [Line(f"torch {way}", "torch", batches, {"how": way}) for way in ways]
        elif asked == "tensorrt" and kernel.backends()["tensorrt"]().probe(hardware.describe()):
            found.append(Line(asked, "tensorrt", batches, {}, tuple(label for label, _, _ in TRT)))
    return found


# Kernels are timed while an engine is built or a module compiled, and who else works on the GPU then spoils the choice:
# the service's engines first, then torch's compiler. Its search among products needs the GPU for itself.
_WAVES = (("inductor", "ort", "tensorrt"), ("torch eager", "torch compiled"))
_ALONE = "torch max-autotune"


def _wave(line: Line) -> str:
    return " ".join(line.name.split()[:2]) if line.kind == "torch" else line.kind


def _known(name: str, graph: str, label: str) -> bool:
    """Whether a configuration is one for this model."""
    convolutions = models.MODELS[name].convolutions
    return not ("channels last" in label and not convolutions) and not ("fused" in graph and name in _PLAIN)


_PLAIN = ("resnet50", "efficientnet", "convnext")  # no transformers: there is nothing to fuse


def _engine(label: str, batches: tuple[int, ...], options: Json, *, fp8: bool = False) -> Line:
    build = {"precision": "fp16", "batch": _ENGINE_BATCH, **options}
    label += ", channels last" if options.get("channels_last") else ""
    return Line(label, "inductor", batches, {"build": build, "fp8": fp8})


class Process:
    """A line at work; `ready`: what it told of each contender and batch size."""

    def __init__(self, line: Line, name: str, folder: Path) -> None:
        self.line = line
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=serve, args=(theirs, line, name, folder), daemon=False)
        self._process.start()
        theirs.close()

    def wait(self, seconds: float) -> list[tuple[str, int, Json]]:
        """What became ready; whoever is not ready within `seconds` is ended, and its rows say so."""
        pipe: Connection = self._pipe
        try:
            if pipe.poll(max(seconds, 0.0)):
                found: list[tuple[str, int, Json]] = pipe.recv()
                return found
            why = "was not ready in time"
        except EOFError:
            why = f"its process ended ({self._process.exitcode})"
        self.close(kill=True)
        labels = self.line.labels or (self.line.name,)
        return [(label, batch, {"failed": why}) for label in labels for batch in self.line.batches]

    def ask(self, *asked: Any) -> Any:
        """What the line answers; a text where something went wrong there."""
        try:
            self._pipe.send(asked)
            return self._pipe.recv()
        except (EOFError, OSError):
            return f"its process ended ({self._process.exitcode})"

    def close(self, *, kill: bool = False) -> None:
        with suppress(OSError):  # it was ended before
            self._pipe.send(None)
        if not kill:
            self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Measured:
    """One model on this process's GPU; `path`: what was found, written after each batch size."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        self.name, self.arguments, self.folder = name, arguments, folder
        self.path: Path = arguments.results / f"{name}.json"
        described = hardware.describe()
        empty = {"gpu": described["gpu"], "versions": versions(), "batches": {}}
        self.result: Json = json.loads(self.path.read_text()) if self.path.exists() else empty
        self.described = described
        self.facts: dict[tuple[str, int], Json] = {}
        self.processes: dict[tuple[str, int], Process] = {}
        self.started: list[Process] = []

    def run(self) -> None:
        in_turn = self.arguments.in_turn
        with self._gpu(fcntl.LOCK_SH):
            self._write()
            say(f"{self.name}: written")
        lines = lines_of(self.name, self.arguments)
        for wave, kinds in enumerate(_WAVES):
            asked = [line for line in lines if _wave(line) in kinds]
            for some in [[line] for line in asked] if in_turn else [asked]:
                with self._gpu(fcntl.LOCK_EX if in_turn else fcntl.LOCK_SH):
                    self._make_ready(some)
            self._together(wave)
        for batch in self.arguments.batch:
            with self._gpu(fcntl.LOCK_EX):
                self._make_ready([line for line in lines if _wave(line) == _ALONE and line.batches == (batch,)])
                self._measure(batch)
        for process in self.started:
            process.close()

    def _make_ready(self, lines: Sequence[Line]) -> None:
        begun, until = [Process(line, self.name, self.folder) for line in lines], self._until()
        self.started += begun
        for process in begun:
            for label, batch, facts in process.wait(until - time.monotonic()):
                self.facts[label, batch] = facts
                if "failed" in facts:
                    say(f"{self.name}: {label}, b={batch}: {facts['failed']}")
                else:
                    self.processes[label, batch] = process
            say(f"{self.name}: {process.line.name} {process.line.batches} ready")

    def _until(self) -> float:
        return time.monotonic() + float(self.arguments.ready_within)

    def _together(self, wave: int) -> None:
        """Until all models of this GPU have come so far, or the time is over."""
        (self.arguments.results / f"{self.name}.wave-{wave}").touch()
        only, gpus, until = self.arguments.only, self.arguments.gpus, self._until()
        same = only[only.index(self.name) % gpus :: gpus]
        others = [self.arguments.results / f"{name}.wave-{wave}" for name in same]
        while time.monotonic() < until and not all(path.exists() for path in others):
            time.sleep(0.2)

    @contextmanager
    def _gpu(self, how: int) -> Iterator[None]:
        """Shared by those that make ready, and for one alone that measures."""
        with (self.arguments.results / f"gpu-{os.environ.get('CUDA_VISIBLE_DEVICES', '0')}.lock").open("w") as lock:
            fcntl.flock(lock, how)
            yield

    def _write(self) -> None:
        """What all processes of this model read."""
        torch.backends.cudnn.allow_tf32 = False
        module = models.make(self.name)
        torch.save(module, self.folder / "module.pt")
        models.program(self.name, self.folder / "program", module)
        net = module.cuda()
        for batch in self.arguments.batch:
            feeds = models.MODELS[self.name].samples(batch, np.random.default_rng(99))
            with torch.inference_mode():
                wanted = models.MODELS[self.name].named(net(*(torch.from_numpy(a).cuda() for a in feeds.values())))
            np.savez(self.folder / f"feeds-{batch}.npz", **feeds)  # type: ignore[arg-type]
            np.savez(self.folder / f"wanted-{batch}.npz", **wanted)  # type: ignore[arg-type]
        del net
        torch.cuda.empty_cache()

    def _measure(self, batch: int) -> None:
        labels = [label for label, size in self.processes if size == batch]
        turns: dict[str, list[Any]] = {label: [] for label in labels}
        before, chance = hardware.conditions(self.described), np.random.default_rng(0)
        for turn in range(ROUNDS + 1):  # the first warms up
            for label in chance.permutation(labels):
                found = self.processes[label, batch].ask("time", label, batch, self.arguments.seconds / ROUNDS)
                if isinstance(found, str):
                    self.facts[label, batch]["failed"] = found
                elif turn:
                    turns[label].append(found)
        kept = self.result["batches"].setdefault(str(batch), {"contenders": {}})
        for (label, size), facts in self.facts.items():
            if size == batch:
                kept["contenders"][label] = {**facts, **(figures(turns[label]) if turns.get(label) else {})}
        kept["conditions"] = {"before": before, "after": hardware.conditions(self.described)}
        if batch in self.arguments.breakdown:
            told = {label: self.processes[label, batch].ask("breakdown", label, batch) for label in labels}
            kept["kernels"] = {label: found for label, found in told.items() if isinstance(found, dict)}
            for label, found in kept["kernels"].items():
                say(f"{self.name} b={batch} {label}: {parts(found)}")
        self.path.write_text(json.dumps(self.result, indent=1, default=str) + "\n")
        say(f"{self.name} b={batch}: { ({k: v.get('gpu_ms') for k, v in kept['contenders'].items()}) }")


def spread(names: Sequence[str], arguments: argparse.Namespace) -> None:
    """Each model in a process of its own, on one GPU after the other (of those that this process sees): what they need
    is made side by side."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = seen.split(",") if seen else [str(i) for i in range(arguments.gpus)]
    threads = max(2, len(os.sched_getaffinity(0)) // (2 * len(names)))

    def one(numbered: tuple[int, str]) -> None:
        index, name = numbered
        command = [sys.executable, __file__, *sys.argv[1:], "--alone", name]
        own = {
            "CUDA_VISIBLE_DEVICES": cards[index % arguments.gpus],
            "TORCHINDUCTOR_COMPILE_THREADS": str(threads),
            "OMP_NUM_THREADS": "6",
        }
        subprocess.run(command, env=os.environ | own, check=False)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, enumerate(names)))


def versions() -> Json:
    found: Json = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        import onnxruntime
    except ImportError:
        return found
    return {**found, "onnxruntime": onnxruntime.__version__}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder: a JSON file for each model")
    parser.add_argument("--only", choices=list(models.MODELS), nargs="+", default=list(models.MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--lines", choices=LINES, nargs="+", default=list(_USUAL), help="who is measured")
    at = "batch sizes of max-autotune, of all models (8) or of one (vit:8)"
    parser.add_argument("--autotune-at", nargs="*", default=["1", "8", "32"], help=at)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and batch size")
    within = "seconds that making ready may take: the engines, then torch's, then each one of max-autotune"
    parser.add_argument("--ready-within", type=float, default=3600.0, help=within)
    parser.add_argument("--in-turn", action="store_true", help="each is made ready while nobody else works on its GPU")
    parser.add_argument("--breakdown", type=int, nargs="*", default=[], help="batch sizes whose kernels are listed")
    parser.add_argument("--gpus", type=int, default=1, help="how many to spread the models over")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print what was measured")
    parser.add_argument("--alone", choices=list(models.MODELS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.results = arguments.results.resolve()
    if not arguments.tables:
        if not torch.cuda.is_available():
            print("There is no NVIDIA GPU here, or torch has no CUDA: nothing was measured.")
            return 0
        arguments.results.mkdir(parents=True, exist_ok=True)
        if not arguments.alone:
            for left in arguments.results.glob("*.wave-*"):
                left.unlink()
        if arguments.alone:
            with tempfile.TemporaryDirectory(prefix="anneal-gpu-") as folder:
                Measured(arguments.alone, arguments, Path(folder)).run()
            return 0
        spread(arguments.only, arguments)
    print(tables(arguments.results, {name: model.label for name, model in models.MODELS.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
