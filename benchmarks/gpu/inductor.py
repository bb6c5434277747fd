"""The backend inductor-cuda beside torch itself on one GPU: the engine that a job would ship, built from a `.pt2`.

    python benchmarks/gpu/inductor.py --only resnet50 --only vit --batch 1 32

Needs torch with CUDA and a C++ compiler, no ONNX Runtime. The engine is built once per model in fp16, from a program
whose batch size is dynamic; torch's contenders are made for each batch size: eager, and `torch.compile` in its default
mode, both captured in a CUDA graph. All of a batch size are measured in turns in one process. "ms" is the median of the
wall clock of one call until the GPU is done, inputs on the GPU; "GPU ms" the time between two CUDA events around it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import models
from timing import cosine

from workers import installation
from workers.artifacts import EXPORTED_PROGRAM, PROGRAM_FILE
from workers.backends.inductor import InductorCudaBackend
from workers.graph.interface import Interface
from workers.installation import KEY_BYTES, Installation
from workers.kernel import Reporter, TensorSpec

ROUNDS = 10
MOST = 64  # the largest batch of the program
Arrays = dict[str, np.ndarray[Any, Any]]
Call = Callable[[], Any]


class Said(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None:
        print(f"    note: {message} {facts or ''}"[:300], file=sys.stderr)


def program(name: str, folder: Path) -> Path:
    """The model as a user uploads it: exported with a dynamic batch, and what its inputs and outputs are called."""
    net, feeds = models.make(name), models.MODELS[name].samples(2, np.random.default_rng(1))
    batch = torch.export.Dim("batch", min=1, max=MOST)
    args = tuple(torch.from_numpy(a) for a in feeds.values())
    with torch.no_grad():
        exported = torch.export.export(net, args, dynamic_shapes=tuple({0: batch} for _ in args))
        logits = net(*args)
    folder.mkdir(parents=True)
    torch.export.save(exported, str(folder / PROGRAM_FILE))
    inputs = tuple(TensorSpec(n, str(a.dtype), ("batch", *a.shape[1:])) for n, a in feeds.items())
    outputs = (TensorSpec(models.MODELS[name].output, "float32", ("batch", *logits.shape[1:])),)
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
    module: Any = models.make(name).cuda().half().eval()
    if "channels_last" in how:
        module = module.to(memory_format=torch.channels_last)
    if "compiled" in how:
        module = torch.compile(module)
    placed = [t.half() if t.is_floating_point() else t for t in (torch.from_numpy(a).cuda() for a in feeds.values())]
    with torch.inference_mode():
        found = module(*placed).float().cpu().numpy()
        replay = captured(lambda: module(*placed))

    def call(_kept: Any = (module, placed)) -> None:  # the graph holds addresses, not tensors
        replay()
        torch.cuda.synchronize()

    return call, {models.MODELS[name].output: found}


def timed(contenders: dict[str, Call], seconds: float) -> dict[str, dict[str, Any]]:
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


def measure(name: str, arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    backend, engine = InductorCudaBackend(), root / "engine"
    engine.mkdir(parents=True)
    source, start = program(name, root / "model"), time.perf_counter()
    options = {"precision": "fp16", "channels_last": name == "resnet50"}
    built = backend.build(source, engine, options, Said(), EXPORTED_PROGRAM)
    result: dict[str, Any] = {"form": built["form"], "build_s": round(time.perf_counter() - start, 1), "batches": {}}
    start = time.perf_counter()
    session = backend.load(engine, {**built["runtime"], "cuda_graph": True})
    result["load_s"] = round(time.perf_counter() - start, 2)
    for batch in arguments.batch:
        feeds = models.MODELS[name].samples(batch, np.random.default_rng(99))
        with torch.inference_mode():
            net = models.make(name).cuda()
            wanted = {
                models.MODELS[name].output: net(*(torch.from_numpy(a).cuda() for a in feeds.values())).cpu().numpy()
            }
        start = time.perf_counter()
        answers = {"inductor-cuda fp16": session.run(feeds)}
        first, compute = time.perf_counter() - start, (session.profile(feeds) or {}).get("compute_ms")
        calls: dict[str, Call] = {"inductor-cuda fp16": session.bind(feeds)}
        for how in arguments.torch:
            start = time.perf_counter()
            calls[f"torch {how}"], answers[f"torch {how}"] = torch_contender(name, feeds, how)
            result.setdefault("ready_s", {})[f"{how} b={batch}"] = round(time.perf_counter() - start, 1)
        figures = timed(calls, arguments.seconds)
        for who, found in answers.items():
            figures[who]["cosine"] = cosine(wanted, found)
        figures["inductor-cuda fp16"] |= {"first_call_s": round(first, 2), "compute_ms": compute}
        result["batches"][str(batch)] = figures
        print(f"{name} b={batch}: {json.dumps(figures)}", file=sys.stderr, flush=True)
        torch._dynamo.reset()
    session.close()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(models.MODELS), action="append", help="may be given several times")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--torch", nargs="*", default=["eager", "compiled", "compiled channels_last"])
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and batch size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU here, or torch has no CUDA: nothing was measured.")
        return 0
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "models": {}}
    with installation.using(Installation(b"k" * KEY_BYTES)):
        for name in arguments.only or models.MODELS:
            with tempfile.TemporaryDirectory(prefix="anneal-gpu-") as folder:
                results["models"][name] = measure(name, arguments, Path(folder))
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
