"""What a `.pt2` brings on this CPU: Inductor's engine of a model beside the best engine of its ONNX form.

    .venv/bin/python benchmarks/pt2.py --models resnet50,efficientnet,vit,bert

The same seeded network goes both ways: its program to Inductor, its simplified ONNX graph to ONNX Runtime and OpenVINO,
all in fp32 and, where the processor has instructions for it, bf16 (int8 is quantized from either, and no difference).
All engines are timed by the stage `benchmark`: in turns, each in processes of its own. What a report says of models
that come as ONNX (`workers/backends/inductor/gains.py`) is from here.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from _common import execute, parser, say, scratch, table

sys.path.insert(0, str(Path(__file__).resolve().parent / "gpu"))
import models

from workers import hardware, installation, kernel
from workers.artifacts import EXPORTED_PROGRAM, ONNX
from workers.candidates import BF16_FLAGS
from workers.installation import KEY_BYTES, Installation
from workers.measure.benchmark_options import EngineOption
from workers.measure.stats import ratio_of_medians
from workers.stages.benchmark import Benchmark, BenchmarkOptions
from workers.stages.simplify import Simplify, SimplifyOptions

Json = dict[str, Any]
OURS = "inductor"
PEERS = ("onnxruntime", "openvino")
_RUNTIME = {"openvino": {"fp32": {"inference_precision": "f32"}, "bf16": {"inference_precision": "bf16"}}}


def engines(backend: str, found: kernel.BackendInfo) -> Iterator[tuple[str, Json, Json]]:
    """(name, build options, runtime options) of each precision that it offers here, but int8."""
    for precision in found.precisions:
        if precision in ("fp32", "bf16"):
            options = {"precision": precision} if backend == OURS else {}
            yield f"{backend}-{precision}", options, _RUNTIME.get(backend, {}).get(precision, {})


def measure_one(name: str, folder: Path, machine: Json, arguments: argparse.Namespace) -> Json:
    module, program, onnx = models.make(name), folder / "program", folder / "onnx"
    onnx.mkdir(parents=True)
    models.program(name, program, module)
    models.write(name, onnx, module)
    (work := folder / "work").mkdir()
    said = models.Said()
    context = kernel.StageContext({"model": onnx}, work, folder / "simplified", said, machine)
    Simplify().run(context, SimplifyOptions())
    simplified, built, options = folder / "simplified" / "model", {}, []
    for backend in (*PEERS, OURS):
        library = kernel.backends()[backend]()
        info = library.probe(machine)
        for label, how, runtime in engines(backend, info) if info else ():
            start = time.perf_counter()
            (out := folder / label).mkdir()
            source, kind = (program, EXPORTED_PROGRAM) if backend == OURS else (simplified, ONNX)
            told = library.build(source, out, how, said, kind)
            built[label] = {"seconds": round(time.perf_counter() - start, 1)}
            options.append(EngineOption(id=label, backend=backend, runtime={**told["runtime"], **runtime}))
            say(f"  {name}: {label} built in {built[label]['seconds']} s")
    inputs = {"baseline": onnx, **{f"engine.{o.id}": folder / o.id for o in options}}
    (work := folder / "timing").mkdir()
    context = kernel.StageContext(inputs, work, folder / "out", said, machine)
    asked = BenchmarkOptions(
        engines=options,
        batch_sizes=[int(b) for b in arguments.batches.split(",")],
        min_seconds=arguments.seconds,
        baseline_backend="onnxruntime",
        cold=False,
    )
    data = Benchmark().run(context, asked).data
    with np.load(folder / "out" / "samples" / "samples.npz") as raw:
        ours = {o.id: o.backend == OURS for o in options}
        batches = {str(b): _beside(raw, data, ours, b) for b in data["batch_sizes"]}
    return {"label": models.MODELS[name].label, "built": built, "batches": batches, "noise": data["noise"]}


def _beside(raw: Any, data: Json, ours: dict[str, bool], batch: int) -> Json:
    """`ours`: of each engine, whether Inductor made it."""
    p50 = {n: data["engines"][n]["batches"][str(batch)]["p50_ms"] for n in ours}
    best = {mine: min((n for n in p50 if ours[n] == mine), key=p50.__getitem__) for mine in (True, False)}
    rounds = {mine: _rounds(raw, name, batch) for mine, name in best.items()}
    ratio = ratio_of_medians(rounds[True], rounds[False]).to_json()
    return {"p50_ms": p50, "ours": best[True], "best": best[False], "ratio": ratio}


def _rounds(raw: Any, name: str, batch: int) -> list[Any]:
    latency, which = raw[f"{name}|{batch}|latency_ns"], raw[f"{name}|{batch}|round"]
    return [latency[which == r] for r in np.unique(which)]


def measure(arguments: argparse.Namespace) -> Json:
    machine = hardware.describe()
    bf16 = bool(set(machine.get("isa") or ()) & BF16_FLAGS)
    say(f"{machine['id']}: {'bf16' if bf16 else 'no bf16'}, compiler {machine.get('cxx')}")
    found: Json = {"isa": machine.get("isa"), "models": {}}
    with scratch(arguments.folder) as folder, installation.using(Installation(b"k" * KEY_BYTES, folder)):
        for name in arguments.models.split(","):
            found["models"][name] = measure_one(name, folder / name, machine, arguments)
            shutil.rmtree(folder / name)
    rows = [
        [m["label"], batch, *(f"{at[k]} {at['p50_ms'][at[k]]:.2f} ms" for k in ("ours", "best")), _shown(at["ratio"])]
        for m in found["models"].values()
        for batch, at in m["batches"].items()
    ]
    print(table(["model", "batch", "from the .pt2", "from its ONNX", "ratio"], rows))
    return found


def _shown(ratio: Json) -> str:
    return f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default="resnet50,efficientnet,vit,bert", help=f"of {', '.join(models.MODELS)}")
    options.add_argument("--batches", default="1,8")
    options.add_argument("--seconds", type=float, default=3.0, help="measured per engine and batch size")
    execute(measure, options.parse_args())


if __name__ == "__main__":
    main()
