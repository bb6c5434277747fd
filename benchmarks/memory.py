"""Peak memory of the stages that read data: the same with 32 and with 1,024 samples; and a model of over 2 GB.

    python benchmarks/memory.py                # ≈ 3 min   every stage, each in a process of its own
    python benchmarks/memory.py --large        # ≈ 10 min  2.2 GB of weights: simplify → quantize → build → validate
    python benchmarks/memory.py --job          # ≈ 12 min  the same model as a job: upload, search, report, bundle

A stage runs as the worker runs it (`python -m workers.pipeline.child`); shown is the peak resident size of that process
(`ru_maxrss`, mapped files included), the largest of `--rounds`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _common import GIB, MIB, ROOT, CannotMeasure, deployment, execute, parser, say, scratch, table, verdict
from onnx import TensorProto, helper, numpy_helper
from peers import anneal

from anneal_client import Client

FEW, MANY = 32, 1024
MOST_GROWTH = 0.10
METHODS = ("minmax", "entropy", "percentile", "mse")
LARGE_LIMIT_BYTES = 24 * GIB
SEED = 20_263

Json = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One stage call: its options, and whether the validated engine is an input."""

    label: str
    stage: str
    options: Mapping[str, Any]


def calls(samples: int) -> list[Call]:
    static = {"recipe": "static_int8", "max_samples": samples}
    judged = {"backend": "onnxruntime", "max_samples": samples}
    return [
        *(
            Call(f"quantize, {m}", "quantize", {**static, "method": m})
            for m in ("minmax", "entropy", "percentile", "mse")
        ),
        Call("equalize", "equalize", {"max_samples": samples}),
        Call("sensitivity", "sensitivity", static),
        Call("validate", "validate", judged),
        Call("quantize_nncf", "quantize_nncf", {"max_samples": samples}),
    ]


# The stages, each in a process of its own


def known_stages() -> set[str]:
    code = "from workers import kernel; print(*kernel.stages())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotMeasure(f"the stages do not load: {done.stderr[-2000:]}")
    return set(done.stdout.split())


def run(call: Call, inputs: Mapping[str, Path], folder: Path) -> tuple[int, float, Json]:
    """(peak resident bytes, seconds, what the stage answered) of one call in `folder`."""
    folder.mkdir(parents=True)
    request = {
        "stage": call.stage,
        "options": dict(call.options),
        "inputs": {name: str(path) for name, path in inputs.items()},
        "workspace": str(folder / "work"),
        "outputs": str(folder / "out"),
        "hardware": {},
        "limits": {"seconds": 3600, "memory_bytes": LARGE_LIMIT_BYTES, "file_bytes": 16 * GIB},
    }
    path = folder / "request.json"
    path.write_text(json.dumps(request))
    started = time.perf_counter()
    with (folder / "answer.json").open("wb") as out, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.pipeline.child", str(path)],
            env=_environment(),
            cwd=ROOT,
            stdout=out,
            stderr=log,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise CannotMeasure(f"{call.label} ended with {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
    text = (folder / "answer.json").read_text()
    answer: Json = json.loads(text[text.index("{") :])
    if "failure" in answer:
        raise CannotMeasure(f"{call.label}: {answer['failure']['code']}: {answer['failure']['detail']}")
    return usage.ru_maxrss * 1024, seconds, answer


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


# Models and data


def small_model(folder: Path) -> None:
    """Convolutions and products on images of 3 × 128 × 128: activations of half a MiB a sample, weights of two."""
    rng = np.random.default_rng(SEED)
    weights, nodes, before, depth = [], [], "image", 3
    for i in range(4):
        shape = (32, depth, 3, 3)
        weights.append(numpy_helper.from_array(rng.normal(0, 0.1, shape).astype(np.float32), f"w{i}"))
        nodes.append(helper.make_node("Conv", [before, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4, strides=[2, 2]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        before, depth = f"r{i}", 32
    weights.append(numpy_helper.from_array(rng.normal(0, 0.02, (32 * 64, 256)).astype(np.float32), "fc1"))
    weights.append(numpy_helper.from_array(rng.normal(0, 0.05, (256, 100)).astype(np.float32), "fc2"))
    nodes += [
        helper.make_node("Flatten", [before], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "fc1"], ["h"], "fc1"),
        helper.make_node("Relu", ["h"], ["a"], "relu"),
        helper.make_node("MatMul", ["a", "fc2"], ["logits"], "fc2"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 128, 128])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 100])
    onnx.save(_model(nodes, image, logits, weights), folder / "model.onnx")


def large_model(folder: Path, layers: int, width: int) -> None:
    """A stack of `layers` products of `width`² with a Relu after each; the weights lie in one external file."""
    rng = np.random.default_rng(SEED)
    weights, nodes, before = [], [], "input"
    with (folder / "model.onnx.data").open("wb") as data:
        for i in range(layers):
            values = rng.standard_normal((width, width), np.float32)
            values *= (2 / width) ** 0.5
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": "model.onnx.data", "offset": data.tell(), "length": values.nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
            data.write(values.tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [before, f"w{i}"], [f"m{i}"], f"product{i}"))
            before = "output" if i == layers - 1 else f"r{i}"
            nodes.append(helper.make_node("Relu", [f"m{i}"], [before], f"relu{i}"))
    inputs = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", width])
    outputs = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", width])
    onnx.save(_model(nodes, inputs, outputs, weights), folder / "model.onnx")


def _model(nodes: Any, inputs: Any, outputs: Any, weights: Any) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "graph", [inputs], [outputs], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def data_set(folder: Path, name: str, shape: tuple[int, ...], seed: int) -> Path:
    folder.mkdir()
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    np.savez(folder / "data.npz", **{name: values})
    return folder


# What is measured


def growth(arguments: argparse.Namespace, folder: Path) -> Json:
    source = folder / "model"
    source.mkdir()
    small_model(source)
    data = data_set(folder / "data", "image", (MANY, 3, 128, 128), SEED + 1)
    quantized = Call("quantize", "quantize", {"recipe": "static_int8", "max_samples": FEW})
    run(quantized, {"model": source, "calibration": data}, folder / "engine")
    inputs = {"model": source, "calibration": data, "data": data, "engine": folder / "engine" / "out" / "model"}
    present = known_stages()
    rows, figures = [], {}
    for few, many in zip(calls(FEW), calls(MANY), strict=True):
        if few.stage not in present:
            rows.append([few.label, "–", "–", "–", f"not measured: there is no stage {few.stage!r}"])
            figures[few.label] = {"not_measured": f"no stage {few.stage!r}"}
            continue
        say(f"{few.label} …")
        names = ("model", "engine", "data") if few.stage == "validate" else ("model", "calibration")
        chosen = {name: inputs[name] for name in names}
        peaks = {}
        for call, count in ((few, FEW), (many, MANY)):
            rounds = [run(call, chosen, folder / f"{few.label}-{count}-{i}")[0] for i in range(arguments.rounds)]
            peaks[count] = max(rounds)
        grown = peaks[MANY] / peaks[FEW] - 1
        rows.append(
            [few.label, _mib(peaks[FEW]), _mib(peaks[MANY]), f"{100 * grown:+.1f} %", verdict(grown <= MOST_GROWTH)]
        )
        figures[few.label] = {"few": peaks[FEW], "many": peaks[MANY], "growth": grown}
    head = ["stage", f"peak MiB, {FEW} samples", f"{MANY:,} samples", "growth", f"≤ {100 * MOST_GROWTH:.0f} %"]
    print(table(head, rows), end="\n\n")
    return {"growth": figures}


def large(arguments: argparse.Namespace, folder: Path) -> Json:
    source = folder / "model"
    source.mkdir()
    large_model(source, arguments.layers, arguments.width)
    size = sum(p.stat().st_size for p in source.iterdir())
    data = data_set(folder / "data", "input", (16, arguments.width), SEED + 1)
    rows, figures = [], {}

    def step(label: str, stage: str, options: Json, inputs: Mapping[str, Path]) -> Path:
        say(f"{label} …")
        at = folder / label.replace(" ", "-").replace(",", "")
        peak, seconds, answer = run(Call(label, stage, options), inputs, at)
        told = answer["data"].get("fell_back") or answer["data"].get("loss_percent")
        rows.append(
            [label, _mib(peak), f"{seconds:.0f}", verdict(peak <= LARGE_LIMIT_BYTES), "" if told is None else str(told)]
        )
        figures[label] = {"peak_bytes": peak, "seconds": seconds}
        return at / "out"

    simplified = step("simplify", "simplify", {}, {"model": source}) / "model"
    for recipe in ("dynamic_int8", "static_int8"):
        options = {"recipe": recipe, "max_samples": 16}
        inputs = {"model": simplified, **({"calibration": data} if recipe == "static_int8" else {})}
        made = step(f"quantize, {recipe}", "quantize", options, inputs) / "model"
        engine = step(f"build, {recipe}", "build", {"backend": "onnxruntime"}, {"model": made})
        (built,) = [p for p in engine.iterdir() if p.is_dir()]
        judged = {"backend": "onnxruntime", "max_samples": 16}
        step(f"validate, {recipe}", "validate", judged, {"model": source, "engine": built, "data": data})
    print(f"{arguments.layers} products of {arguments.width} × {arguments.width}: {size / 1e9:.2f} GB\n")
    head = ["stage", "peak MiB", "s", f"within {LARGE_LIMIT_BYTES // GIB} GiB", "fell back / loss"]
    print(table(head, rows), end="\n\n")
    return {"large": figures, "model_bytes": size}


def job(arguments: argparse.Namespace, folder: Path) -> Json:
    """The large model through the API, as its owner would send it, and the least memory that was left meanwhile."""
    source = folder / "model"
    source.mkdir()
    large_model(source, arguments.layers, arguments.width)
    archive = folder / "model.tar"
    with tarfile.open(archive, "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    size = archive.stat().st_size
    shutil.rmtree(source)
    sets = [data_set(folder / n, "input", (64, arguments.width), SEED + i) / "data.npz" for i, n in enumerate("cv", 1)]
    with Watch() as memory, deployment(folder / "home") as service, Client(service.url) as client:
        say(f"upload of {size / 1e9:.2f} GB …")
        model = client.upload_model(archive, "large")
        calibration, validation = (client.upload_dataset(path) for path in sets)
        spec = {
            "model_id": model["id"],
            "calibration": {"dataset_id": calibration["id"], "max_samples": 32},
            "validation": {"dataset_id": validation["id"], "metric": "normalized_error"},
            "benchmark": {"batch_sizes": [1, 8], "min_seconds": 1.5},
            "budget_seconds": arguments.budget,
        }
        ended = client.wait(client.submit(spec)["id"], check=False, on_event=lambda e: _tell(anneal.short(e)))
        if ended["status"] != "succeeded":
            raise CannotMeasure(f"the job {ended['status']}: {ended['error']}")
        report = client.report(ended["id"])
        bundle = anneal.fetch_bundle(client, ended, folder / "bundle")
        unpacked = sum(p.stat().st_size for p in (folder / "bundle").rglob("*") if p.is_file())
    spent, final, limit = report["search"]["spent_seconds"], report["final_metrics"], LARGE_LIMIT_BYTES
    late = 1.1 * arguments.budget
    rows = [
        ["memory taken, at most", f"{_mib(memory.most)} MiB", f"≤ {limit // GIB} GiB", verdict(memory.most <= limit)],
        ["time", f"{spent:.0f} s", f"≤ {late:.0f} s", verdict(spent <= late)],
        ["what ships", f"{report['picked']}, {final['speedup']}, loss {final['accuracy_loss_percent']}", "", ""],
        ["bundle", f"{unpacked / 1e9:.2f} GB", "", ""],
    ]
    print(table([f"a model of {size / 1e9:.2f} GB", "", "goal", ""], rows), end="\n\n")
    return {"job": {"most_bytes": memory.most, "report": report, "bundle": bundle}, "model_bytes": size}


def _tell(line: str | None) -> None:
    if line:
        say(line)


class Watch:
    """`most`: by how many bytes the machine's available memory fell at the most; the page cache counts as available."""

    def __enter__(self) -> Watch:
        self.most, self._before, self._done = 0, _available(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.1):
            self.most = max(self.most, self._before - _available())


def _available() -> int:
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def measure(arguments: argparse.Namespace) -> Json:
    weights = 4 * arguments.layers * arguments.width**2
    needed = 12 * weights if arguments.job else 6 * weights if arguments.large else GIB
    with scratch(arguments.folder, needed) as folder:
        if arguments.job:
            return job(arguments, folder)
        return large(arguments, folder) if arguments.large else growth(arguments, folder)


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=1, help="runs of each call; the largest peak counts")
    options.add_argument("--large", action="store_true", help="the model of over 2 GB instead")
    options.add_argument("--job", action="store_true", help="that model through the API, as a job")
    options.add_argument("--budget", type=int, default=600, help="of that job, in seconds")
    options.add_argument("--layers", type=int, default=34, help="of the large model")
    options.add_argument("--width", type=int, default=4096, help="of the large model")
    execute(measure, options.parse_args())
