"""Who is measured: each kind is made ready in a process of its own, for one model at all batch sizes.

A process reads what the model's own one wrote into `folder` (`module.pt`, the program as a user uploads it in
`program/`, feeds and the answers of torch in float32), makes its calls ready, and then times them when it is told to.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import models
from breakdown import kernels
from timing import Call, captured, clocked, cosine

Arrays = dict[str, np.ndarray[Any, Any]]
Json = dict[str, Any]
CALIBRATION = 32
GRAPHS: dict[str, dict[str, str] | None] = {  # name → options of `convert`; None = simplified; "fused": with fusions
    "fp32": None,
    "fp32 fused": None,
    "fp16": {"recipe": "fp16"},
    "fp16 fused": {"recipe": "fp16"},
    "fp16 fused but attention": {"recipe": "fp16"},
    "int8": {"recipe": "int8"},
    "int8+fp16": {"recipe": "int8", "high_precision": "fp16"},
    "fp8+fp16": {"recipe": "fp8", "high_precision": "fp16"},
}
_QDQ = {"session_config": {"session.disable_quant_qdq": "1"}}  # else part of it is sent to the CPU
ORT = (  # name, graph, runtime options
    ("ORT fp32", "fp32", {}),
    ("ORT fp32, no TF32", "fp32", {"tf32": False}),
    ("ORT fp32, graph", "fp32", {"cuda_graph": True}),
    ("ORT fp32, fused, graph", "fp32 fused", {"cuda_graph": True}),
    ("ORT fp16", "fp16", {}),
    ("ORT fp16, graph", "fp16", {"cuda_graph": True}),
    ("ORT fp16, channels last, graph", "fp16", {"cuda_graph": True, "prefer_nhwc": True}),
    ("ORT fp16, fused but attention, graph", "fp16 fused but attention", {"cuda_graph": True}),
    ("ORT fp16, fused, graph", "fp16 fused", {"cuda_graph": True}),
    ("ORT int8 Q/DQ in fp32", "int8", _QDQ),
    ("ORT int8 Q/DQ in fp16", "int8+fp16", _QDQ),
)
TRT = tuple(  # name, graph, runtime options
    (f"TensorRT {label}{', graph' if graph_captured else ''}", graph, {"cuda_graph": graph_captured})
    for label, graph in (("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8+fp16"), ("fp8", "fp8+fp16"))
    for graph_captured in (False, True)
)


@dataclass(frozen=True)
class Line:
    """What one process makes ready. `kind`: a key of `_KINDS`; `labels`: of contenders, for those kinds that have
    several; `options`: of the kind."""

    name: str
    kind: str
    batches: tuple[int, ...]
    options: Json
    labels: tuple[str, ...] = ()


@dataclass
class Ready:
    """One contender at one batch size. `call`: None where it failed, and `facts` say why."""

    label: str
    batch: int
    facts: Json
    call: Call | None = None
    stream: Any = None


class Work:
    """A line at work on one model."""

    def __init__(self, line: Line, name: str, folder: Path) -> None:
        self.line, self.name, self.folder, self.model = line, name, folder, models.MODELS[name]
        plain = "-".join([line.name, *map(str, line.batches)])
        self.own = folder / plain.replace(" ", "-").replace(",", "").replace("'", "")
        self.own.mkdir()

    def feeds(self, batch: int) -> Arrays:
        return dict(np.load(self.folder / f"feeds-{batch}.npz"))

    def module(self) -> Any:
        """Made by the model's own process, of this program's classes."""
        return torch.load(self.folder / "module.pt", weights_only=False)

    def entered(self, label: str, batch: int, make: Callable[[], tuple[Any, ...]], **known: Any) -> Ready:
        """`make`: the call, its answers, its stream or None, and what is known of it."""
        began = time.monotonic()
        try:
            call, answers, stream, *more = make()
        except Exception as error:  # a contender that fails leaves a row that says so
            return Ready(label, batch, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        wanted = dict(np.load(self.folder / f"wanted-{batch}.npz"))
        facts = {**known, "cosine": cosine(wanted, answers), "ready_s": round(time.monotonic() - began, 1)}
        return Ready(label, batch, facts | (more[0] if more else {}), call, stream)


def torch_line(work: Work) -> Iterator[Ready]:
    """`how`: words among eager, compiled, max-autotune, fp32, channels_last. In float16 and captured in a CUDA graph,
    compiled for each batch size; fp32 is torch's eager mode as it is. `threads`: that compile, where it tunes."""
    how = str(work.line.options["how"])
    for batch in work.line.batches:

        def make(batch: int = batch) -> tuple[Any, ...]:
            module: Any = work.module().cuda()
            half = "fp32" not in how
            module = (module.half() if half else module).eval()
            if "channels_last" in how:
                module = module.to(memory_format=torch.channels_last)
            if "max-autotune" in how:  # hundreds of kernels are compiled, and nothing else is made ready beside
                from torch._inductor import config

                config.compile_threads = work.line.options["threads"]
            if "eager" not in how:
                mode = "max-autotune-no-cudagraphs" if "max-autotune" in how else None
                module = torch.compile(module, mode=mode)
            placed = [torch.from_numpy(a).cuda() for a in work.feeds(batch).values()]
            placed = [t.half() if half and t.is_floating_point() else t for t in placed]
            with torch.inference_mode():
                found = work.model.named(module(*placed))

            def run() -> None:
                with torch.inference_mode():
                    module(*placed)

            replay = captured(run) if half else run

            def call(_kept: Any = (module, placed)) -> None:  # the graph holds addresses, not tensors
                replay()

            return call, found, None

        yield work.entered(f"torch {how}", batch, make)
        torch._dynamo.reset()


def inductor_line(work: Work) -> Iterator[Ready]:
    """`build`: options of the build; `fp8`: of a calibrated program. One engine for all batch sizes."""
    from workers.artifacts import EXPORTED_PROGRAM
    from workers.backends.inductor import InductorCudaBackend
    from workers.graph import program_ranges
    from workers.graph.exported_program import ProgramFolder

    source, backend = work.folder / "program", InductorCudaBackend()
    began = time.monotonic()
    if work.line.options.get("fp8"):
        samples = work.model.samples(CALIBRATION, np.random.default_rng(11))
        found = program_ranges.observed(ProgramFolder.read(source), [samples])
        source = shutil.copytree(source, work.own / "calibrated")
        program_ranges.write(source, found)
    engine = work.own / "engine"
    engine.mkdir()
    observed = time.monotonic()
    built = backend.build(source, engine, work.line.options["build"], models.Said(), EXPORTED_PROGRAM)
    size = sum(p.stat().st_size for p in engine.iterdir())
    facts = {"form": built["form"], "build_s": round(time.monotonic() - observed, 1), "mb": round(size / 1e6)}
    facts["calibration_s"] = round(observed - began, 1)
    start = time.perf_counter()
    session: Any = backend.load(engine, {**built["runtime"], "cuda_graph": True})
    facts["load_s"] = round(time.perf_counter() - start, 2)
    for batch in work.line.batches:

        def make(batch: int = batch) -> tuple[Any, ...]:
            feeds, start = work.feeds(batch), time.perf_counter()
            answers = dict(session.run(feeds))
            took = round(time.perf_counter() - start, 2)
            return session.bound(feeds, wait=False), answers, None, {"first_call_s": took}

        yield work.entered(work.line.name, batch, make, **facts)


def ort_line(work: Work) -> Iterator[Ready]:
    """ONNX Runtime's CUDA provider, in all configurations that `labels` name."""
    from workers.backends.onnxruntime_cuda.session import OnnxRuntimeCudaSession, RuntimeOptions

    wanted = [each for each in ORT if each[0] in work.line.labels]
    folders, facts = graphs(work, [graph for _, graph, _ in wanted])
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own has no annotation
    for batch in work.line.batches:
        for label, graph, runtime in wanted:

            def make(batch: int = batch, graph: str = graph, runtime: Json = runtime) -> tuple[Any, ...]:
                if graph not in folders:
                    raise ValueError(facts[graph]["failed"])
                options = RuntimeOptions.model_validate(runtime)
                session, feeds = OnnxRuntimeCudaSession(folders[graph], options, stream.cuda_stream), work.feeds(batch)
                return session.bound(feeds, wait=False), session.run(feeds), stream

            yield work.entered(label, batch, make, graph=facts.get(graph))


def trt_line(work: Work) -> Iterator[Ready]:
    """By the service's own backend: built for these shapes, inputs on the GPU. Its bound call waits for the GPU, on a
    stream of its own: the time on the GPU is the one that its own events tell (`own_gpu_ms`)."""
    from workers import kernel

    backend: Any = kernel.backends()["tensorrt"]()
    wanted = [each for each in TRT if each[0] in work.line.labels]
    folders, facts = graphs(work, [graph for _, graph, _ in wanted])
    for batch in work.line.batches:
        for label, graph, runtime in wanted:

            def make(batch: int = batch, label: str = label, graph: str = graph, runtime: Json = runtime) -> Any:
                feeds = work.feeds(batch)
                shapes = {n: {k: [*a.shape] for k in ("min", "opt", "max")} for n, a in feeds.items()}
                out = work.own / f"{label.replace(' ', '-').replace(',', '')}-{batch}"
                out.mkdir()
                built = backend.build(folders[graph], out, {"shapes": shapes}, models.Said())
                session = backend.load(out, {**built["runtime"], **runtime})
                profile = dict(session.profile(feeds) or {})
                return session.bind(feeds), session.run(feeds), None, {"own_gpu_ms": profile.get("compute_ms")}

            yield work.entered(label, batch, make, graph=facts.get(graph))


def graphs(work: Work, wanted: list[str]) -> tuple[dict[str, Path], Json]:
    """Folders of the ONNX graphs in each precision, and what the conversion told of each."""
    from workers import hardware
    from workers.kernel import StageContext
    from workers.stages.convert import Convert, ConvertOptions
    from workers.stages.simplify import Simplify, SimplifyOptions

    exported, data, facts = work.own / "exported", work.own / "data", {}
    exported.mkdir()
    data.mkdir()
    models.write(work.name, exported, work.module())
    np.savez(data / "data.npz", **work.model.samples(CALIBRATION, np.random.default_rng(11)))  # type: ignore[arg-type]
    folders: dict[str, Path] = {}
    needed = ["fp32", *(["fp32 fused"] if any("fused" in g for g in wanted) else [])]
    needed += ["fp32 fused but attention"] if "fp16 fused but attention" in wanted else []
    for label in dict.fromkeys((*needed, *wanted)):
        workspace, out = (work.own / f"{label.replace(' ', '-')}-{part}" for part in ("work", "out"))
        workspace.mkdir()
        try:
            if GRAPHS.get(label) is None:
                ctx = StageContext({"model": exported}, workspace, out, models.Said(), hardware.describe())
                with _left_alone("but attention" in label):
                    found = Simplify().run(ctx, SimplifyOptions(fusions="fused" in label)).data
                if "fused" in label and not found["contrib_ops"]:
                    raise ValueError("nothing was fused")
                facts[label] = {"fusions": found["fusions"]}
            else:
                start = label.replace("fp16", "fp32") if "fused" in label else "fp32"
                inputs = {"model": folders[start], "calibration": data}
                ctx = StageContext(inputs, workspace, out, models.Said(), hardware.describe())
                found = Convert().run(ctx, ConvertOptions.model_validate(GRAPHS[label])).data
                facts[label] = {**facts.get(start, {}), **{k: found[k] for k in ("qdq_by_op", "kept_fp32", "opset")}}
            folders[label] = out / "model"
        except Exception as error:
            facts[label] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return folders, facts


def _left_alone(attention: bool) -> AbstractContextManager[Any]:
    """While `simplify` runs: as if it knew no attention, for what its fusion is worth."""
    from workers.stages import simplify

    return patch.object(simplify, "_attention", return_value=None) if attention else nullcontext()


_KINDS: dict[str, Callable[[Work], Iterator[Ready]]] = {
    "torch": torch_line,
    "inductor": inductor_line,
    "ort": ort_line,
    "tensorrt": trt_line,
}


def serve(pipe: Connection, line: Line, name: str, folder: Path) -> None:
    """A line's process: tells what became ready, then answers `(label, batch, seconds)` with the times of calls, and
    `("breakdown", label, batch)` with the GPU's time by kernel, until it is told None."""
    from workers import installation
    from workers.installation import KEY_BYTES, Installation

    os.environ["TMPDIR"] = str(folder)
    torch.set_num_threads(2)
    torch.backends.cuda.matmul.allow_tf32 = True  # as ONNX Runtime's default; of float32 contenders alone
    ready: dict[tuple[str, int], Ready] = {}
    with installation.using(Installation(b"k" * KEY_BYTES)):
        try:
            for found in _KINDS[line.kind](Work(line, name, folder)):
                ready[found.label, found.batch] = found
        except Exception as error:
            why = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            for label in line.labels or (line.name,):
                for batch in line.batches:
                    ready.setdefault((label, batch), Ready(label, batch, why))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what making ready took: others need the room
        pipe.send([(r.label, r.batch, r.facts) for r in ready.values()])
        while (asked := pipe.recv()) is not None:
            told, label, batch, *rest = asked
            one = ready[label, batch]
            assert one.call is not None
            stream = one.stream or torch.cuda.current_stream()
            try:
                pipe.send(clocked(one.call, stream, *rest) if told == "time" else kernels(one.call))
            except Exception as error:  # of a kernel at work
                pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
