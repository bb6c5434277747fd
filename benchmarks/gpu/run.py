"""ONNX Runtime's CUDA provider, PyTorch and TensorRT side by side on one GPU, on the models of `models.py`.

    python benchmarks/gpu/run.py --json figures.json --markdown figures.md

Needs the `gpu` extra, torch with CUDA, onnxscript; what is missing is skipped, with its reason. Inputs and outputs
stay on the GPU. "GPU ms" is the median of the time between two CUDA events around one run in its stream, "ms" that of
the wall clock until the GPU is done, one caller. All contenders of a batch size are measured in turns in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]
import models
from timing import Contender, contest, cosine

from workers import hardware, kernel
from workers.backends.onnxruntime_cuda.session import OnnxRuntimeCudaSession, RuntimeOptions
from workers.devices.cuda import gpus
from workers.devices.cuda.runtime import Cuda, Stream
from workers.kernel import Reporter, StageContext
from workers.stages.convert import Convert, ConvertOptions
from workers.stages.simplify import Simplify, SimplifyOptions

BATCHES = (1, 8, 32)
CALIBRATION = 32
GRAPHS: dict[str, dict[str, str] | None] = {  # name → options of `convert`; None = simplified; "fused": with fusions
    "fp32": None,
    "fp32 fused": None,
    "fp16": {"recipe": "fp16"},
    "fp16 fused": {"recipe": "fp16"},
    "int8": {"recipe": "int8"},
    "int8+fp16": {"recipe": "int8", "high_precision": "fp16"},
    "fp8+fp16": {"recipe": "fp8", "high_precision": "fp16"},
}
ORT = (  # name, graph, runtime options
    ("ORT CUDA fp32", "fp32", {}),
    ("ORT CUDA fp32, no TF32", "fp32", {"tf32": False}),
    ("ORT CUDA fp32, graph", "fp32", {"cuda_graph": True}),
    ("ORT CUDA fp16", "fp16", {}),
    ("ORT CUDA fp16, graph", "fp16", {"cuda_graph": True}),
    ("ORT CUDA fp16, NHWC, graph", "fp16", {"cuda_graph": True, "prefer_nhwc": True}),
    ("ORT CUDA fp32, fused, graph", "fp32 fused", {"cuda_graph": True}),
    ("ORT CUDA fp16, fused, graph", "fp16 fused", {"cuda_graph": True}),
    # The provider has no int8 products; without this it even sends part of the Q/DQ to the CPU.
    ("ORT CUDA int8 Q/DQ in fp32", "int8", {"session_config": {"session.disable_quant_qdq": "1"}}),
    ("ORT CUDA int8 Q/DQ in fp16", "int8+fp16", {"session_config": {"session.disable_quant_qdq": "1"}}),
)
TRT = tuple(  # name, graph, runtime options
    (f"TensorRT {label}{', graph' if captured else ''}", graph, {"cuda_graph": captured})
    for label, graph in (("fp32", "fp32"), ("fp16", "fp16"), ("int8", "int8+fp16"), ("fp8", "fp8+fp16"))
    for captured in (False, True)
)
Arrays = dict[str, np.ndarray[Any, Any]]
Json = dict[str, Any]


class Said(Reporter):
    def progress(self, fraction: float, message: str = "") -> None: ...

    def note(self, message: str, **facts: Any) -> None:
        say(f"    note: {message} {facts or ''}"[:300])


def say(text: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", file=sys.stderr, flush=True)


_BEGAN = time.monotonic()


def prepare(name: str, root: Path, described: Json, wanted: Sequence[str]) -> tuple[dict[str, Path], Json]:
    """Folders of the graphs in each precision, and what the conversion told of each."""
    exported, data, facts = root / "exported", root / "data", {}
    exported.mkdir(parents=True)
    data.mkdir()
    models.write(name, exported)
    say(f"{name}: exported")
    np.savez(data / "data.npz", **models.MODELS[name].samples(CALIBRATION, np.random.default_rng(11)))
    folders: dict[str, Path] = {}
    first = ["fp32", *(["fp32 fused"] if any("fused" in g for g in wanted) else [])]
    for label in (*first, *(g for g in wanted if g not in first)):
        options = GRAPHS[label]
        workspace, out = root / f"{label}-work".replace(" ", "-"), root / f"{label}-out".replace(" ", "-")
        workspace.mkdir()
        try:
            if options is None:
                ctx = StageContext({"model": exported}, workspace, out, Said(), described)
                found = Simplify().run(ctx, SimplifyOptions(fusions="fused" in label)).data
                if "fused" in label and not found["contrib_ops"]:
                    raise ValueError("nothing was fused")
                facts[label] = {"fusions": found["fusions"]}
            else:
                inputs = {"model": folders["fp32 fused" if "fused" in label else "fp32"], "calibration": data}
                ctx = StageContext(inputs, workspace, out, Said(), described)
                found = Convert().run(ctx, ConvertOptions.model_validate(options)).data
                facts[label] = {k: found[k] for k in ("trial_run", "qdq_by_op", "kept_fp32", "opset")}
            folders[label] = out / "model"
        except Exception as error:
            facts[label] = {"failed": str(error)[:300]}
        say(f"{name}: {label} {json.dumps(facts.get(label, {}))[:200]}")
    return folders, facts


def ort_contender(folder: Path, runtime: Json, feeds: Arrays, stream: Stream) -> tuple[Callable[[], Any], Arrays]:
    session = OnnxRuntimeCudaSession(folder, RuntimeOptions.model_validate(runtime), stream.handle)
    return session.bound(feeds, wait=False), session.run(feeds)


def torch_contender(name: str, feeds: Arrays, stream: Stream, how: str) -> tuple[Callable[[], Any], Arrays]:
    """`how`: words among fp32, fp16, compiled."""
    half = "fp16" in how
    module = models.make(name).cuda()
    placed = [torch.from_numpy(a).cuda() for a in feeds.values()]
    if half:
        module = module.half()
        placed = [t.half() if t.is_floating_point() else t for t in placed]
    run: Any = module
    if "compiled" in how:  # `reduce-overhead` is torch's name for CUDA graphs
        run = torch.compile(module, mode="reduce-overhead" if "graph" in how else None)
    external = torch.cuda.ExternalStream(stream.handle)

    def submit() -> Any:
        with torch.inference_mode(), torch.cuda.stream(external):
            return run(*placed)

    for _ in range(3):
        output = submit()
    external.synchronize()
    return submit, models.MODELS[name].named(output)


def trt_contender(folder: Path, root: Path, runtime: Json, feeds: Arrays) -> tuple[Callable[[], Any], Arrays, Json]:
    """By the service's own backend: built for these shapes, inputs on the GPU. Its bound call waits for the GPU, on a
    stream of its own: the time on the GPU is the one that its own events tell."""
    backend = kernel.backends()["tensorrt"]()
    shapes = {n: {k: [*a.shape] for k in ("min", "opt", "max")} for n, a in feeds.items()}
    out = root / f"trt-{folder.parent.name}-{len(next(iter(feeds.values())))}"
    if not out.exists():
        out.mkdir()
        built = backend.build(folder, out, {"shapes": shapes}, Said())
        (out.with_suffix(".json")).write_text(json.dumps(built["runtime"]))
    session = backend.load(out, {**json.loads(out.with_suffix(".json").read_text()), **runtime})
    profile = dict(session.profile(feeds) or {})
    return session.bind(feeds), session.run(feeds), {**profile, "own_gpu_p50_ms": profile.get("compute_ms")}


def trt_missing(described: Json) -> str | None:
    """Why TensorRT is skipped, or None."""
    if "tensorrt" not in kernel.backends():
        return "this version of the service has no TensorRT backend"
    return None if kernel.backends()["tensorrt"]().probe(described) else "TensorRT is not installed here"


class Line:
    """Who runs at one batch size, and what was seen when each was made ready."""

    def __init__(self, cuda: Cuda, wanted: Arrays) -> None:
        self.cuda = cuda
        self.wanted = wanted
        self.contenders: list[Contender] = []
        self.seen: dict[str, Json] = {}

    def enter(self, label: str, make: Callable[[], Any]) -> None:
        before, began = self.cuda.mem_info()[0], time.monotonic()
        try:
            submit, outputs, *more = make()
        except Exception as error:  # a contender that fails leaves a row that says so
            self.seen[label] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
            say(f"  {label}: {self.seen[label]['failed']}")
            return
        self.seen[label] = {
            "cosine": cosine(self.wanted, outputs),
            # torch keeps what it frees, for its next contender: what it holds more says nothing of the model
            **({} if "torch" in label else {"gpu_memory_mb": round((before - self.cuda.mem_info()[0]) / 1e6)}),
            "ready_s": round(time.monotonic() - began, 1),
            **(more[0] if more else {}),
        }
        self.contenders.append(Contender(label, submit))

    def figures(self, batch: int) -> dict[str, Json]:
        timed = {c.name: {**self.seen[c.name], **c.figures(batch)} for c in self.contenders}
        for found in timed.values():
            if own := found.get("own_gpu_p50_ms"):  # `runner_overhead`: one caller's wait over TensorRT's own time
                found |= {"gpu_p50_ms": own, "runner_overhead": round(found["wall_p50_ms"] / own, 3)}
        return {**{k: v for k, v in self.seen.items() if k not in timed}, **timed}


def measure(name: str, arguments: argparse.Namespace, root: Path, described: Json) -> Json:
    folders, facts = prepare(name, root, described, arguments.graphs)
    reference = kernel.backends()["onnxruntime"]().load(folders["fp32"], {})
    skipped = trt_missing(described)
    result: Json = {"conversion": facts, "batches": {}, "skipped": {"TensorRT": skipped} if skipped else {}}
    cuda = Cuda()
    with cuda.context():
        stream = cuda.stream()
        for batch in arguments.batch:
            feeds = models.MODELS[name].samples(batch, np.random.default_rng(99))
            line = Line(cuda, reference.run(feeds))
            for label, graph, runtime in ORT:
                if graph in folders:
                    line.enter(label, partial(ort_contender, folders[graph], runtime, feeds, stream))
            for how in arguments.torch:
                line.enter(f"torch {how}", partial(torch_contender, name, feeds, stream, how))
            for label, graph, runtime in TRT if skipped is None else ():
                if graph in folders:
                    line.enter(label, partial(trt_contender, folders[graph], root, runtime, feeds))
            before = hardware.conditions(described)
            contest(cuda, stream, line.contenders, arguments.seconds)
            result["batches"][str(batch)] = {
                "figures": line.figures(batch),
                "conditions": {"before": before, "after": hardware.conditions(described)},
            }
            say(f"{name} batch {batch}: { ({k: v.get('gpu_p50_ms') for k, v in line.figures(batch).items()}) }")
            line.contenders.clear()
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            if arguments.json:
                arguments.json.with_suffix(f".{name}.json").write_text(json.dumps(result, indent=1))
    return result


def table(label: str, found: Mapping[str, Any]) -> str:
    """Markdown: one row per contender, GPU time and the ratio to ORT CUDA fp32 for each batch size."""
    sizes = list(found["batches"])
    names = list(dict.fromkeys(n for s in sizes for n in found["batches"][s]["figures"]))
    head = [label, *(t for s in sizes for t in (f"b={s}: GPU ms", "× ORT fp32", "ms, 1 caller")), "cosine", "GPU MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        cells = [name]
        last: Mapping[str, Any] = {}
        for size in sizes:
            figures = found["batches"][size]["figures"]
            last, base = figures.get(name, {}), figures.get("ORT CUDA fp32", {})
            if "gpu_p50_ms" not in last:
                cells += [f"failed: {str(last.get('failed', '–'))[:60]}", "–", "–"]
                continue
            ratio = base["gpu_p50_ms"] / last["gpu_p50_ms"] if "gpu_p50_ms" in base else float("nan")
            cells += [f"{last['gpu_p50_ms']:.3f}", f"{ratio:.2f}", f"{last['wall_p50_ms']:.3f}"]
        cells += [str(last.get("cosine", "–")), str(last.get("gpu_memory_mb", "–"))]
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(models.MODELS), action="append", help="may be given several times")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--graphs", nargs="+", choices=list(GRAPHS), default=list(GRAPHS), help="precisions to prepare")
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and batch size")
    parser.add_argument(
        "--torch",
        nargs="*",
        default=["eager fp32", "eager fp16", "compiled fp16", "compiled graph fp16"],
        help="PyTorch contenders: words among eager, compiled, graph, fp32, fp16",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    described = hardware.describe()
    if described["gpu"] is None or not torch.cuda.is_available():
        print("There is no NVIDIA GPU here, or torch has no CUDA: nothing was measured.")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = True  # as ONNX Runtime's default
    results: Json = {"gpu": described["gpu"], "hardware": described["id"], "versions": versions(), "models": {}}
    text = [f"GPU: {described['gpu']['name']}, driver {described['gpu']['driver']}, {json.dumps(results['versions'])}"]
    for name in arguments.only or models.MODELS:
        with tempfile.TemporaryDirectory(prefix="anneal-gpu-") as folder:
            results["models"][name] = measure(name, arguments, Path(folder), described)
        text.append(table(models.MODELS[name].label, results["models"][name]))
        print(text[-1], flush=True)
        results["gpu_state"] = gpus.state(str(described["gpu"]["uuid"]))
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1, default=str) + "\n")
        if arguments.markdown:
            arguments.markdown.write_text("\n\n".join(text) + "\n")
    return 0


def versions() -> Json:
    import onnxruntime

    found = {"torch": torch.__version__, "torch_cuda": torch.version.cuda, "onnxruntime": onnxruntime.__version__}
    return {**found, "cuda_library": Cuda().library, "cudnn": torch.backends.cudnn.version()}


if __name__ == "__main__":
    sys.exit(main())
