"""One tool makes its engine from one model, in a process of its own: `python benchmarks/peers/make.py TASK.json`.

TASK.json: `peer`, `model` (.onnx), `calibration` (.npz), `transformer`, `axes`, `out` (a folder), `olive` (an
interpreter).
Written to OUT/engine.json: what the runner loads (`kind`, `file`, `config`). Imports count: a user waits for them, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Task = dict[str, Any]

LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
CALIBRATION_BATCH = 1
NNCF_SUBSET = 300  # nncf.quantize's own default


def samples(task: Task) -> Iterator[dict[str, Array]]:
    """The calibration data, one sample at a time, as every tool's examples feed it."""
    arrays, axes = dict(np.load(task["calibration"])), task["axes"]
    count = next(a.shape[axes.get(n, 0)] for n, a in arrays.items() if axes.get(n, 0) is not None)
    for i in range(count):
        along = {n: axes.get(n, 0) for n in arrays}
        yield {n: a if along[n] is None else np.take(a, [i], along[n]) for n, a in arrays.items()}


# ONNX Runtime: onnxruntime.ai/docs/performance/model-optimizations/quantization.html


def ort(task: Task) -> Task:
    return {"kind": "onnxruntime", "file": task["model"]}


def preprocessed(task: Task) -> Path:
    """The step before quantization that the documentation asks for; its symbolic shape inference fails on some graphs,
    and is then left out by the option that is there for it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = Path(task["out"]) / "preprocessed.onnx"
    try:
        quant_pre_process(task["model"], str(path))
    except Exception as error:  # whatever shape inference trips over
        print(f"{type(error).__name__}: {error}; again without symbolic shape inference", file=sys.stderr)
        quant_pre_process(task["model"], str(path), skip_symbolic_shape=True)
    return path


def ort_dynamic(task: Task) -> Task:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source, path = preprocessed(task), Path(task["out"]) / "model.onnx"
    quantize_dynamic(str(source), str(path), weight_type=QuantType.QInt8)
    source.unlink()
    return {"kind": "onnxruntime", "file": str(path)}


def ort_static(task: Task, op_types: list[str] | None = None) -> Task:
    """QDQ, unsigned activations and signed weights per channel: what the documentation advises for CPUs with VNNI."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._samples = samples(task)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._samples, None)

    source, path = preprocessed(task), Path(task["out"]) / "model.onnx"
    quantize_static(
        str(source),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=op_types,
    )
    source.unlink()
    return {"kind": "onnxruntime", "file": str(path)}


def ort_static_matmul(task: Task) -> Task:
    return ort_static(task, ["MatMul", "Gemm"])


# OpenVINO and NNCF: docs.openvino.ai, "Post-training Quantization"


def openvino(task: Task) -> Task:
    import openvino as ov

    ov.Core().compile_model(ov.convert_model(task["model"]), "CPU", LATENCY)
    return {"kind": "openvino", "file": task["model"], "config": LATENCY}


def nncf_int8(task: Task) -> Task:
    import nncf
    import openvino as ov

    model = ov.convert_model(task["model"])
    data = nncf.Dataset(list(samples(task))[:NNCF_SUBSET])
    options = {"model_type": nncf.ModelType.TRANSFORMER} if task["transformer"] else {}
    quantized = nncf.quantize(model, data, subset_size=NNCF_SUBSET, **options)
    path = Path(task["out"]) / "model.xml"
    ov.save_model(quantized, str(path))
    return {"kind": "openvino", "file": str(path), "config": LATENCY}


# Olive: microsoft.github.io/Olive, `olive optimize` and, for one's own calibration data, `olive run` with a config

OLIVE_DATA = """
import numpy as np
from olive.data.registry import Registry

class Rows:
    def __init__(self, path):
        self.arrays = dict(np.load(path))
    def __len__(self):
        return len(next(iter(self.arrays.values())))
    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError(i)
        return {n: a[i] for n, a in self.arrays.items()}, 0  # samples along the first axis, as Olive has it

@Registry.register_dataset()
def calibration_rows(path, **_):
    return Rows(path)
"""


def olive(task: Task, *arguments: str) -> Task:
    folder = Path(task["out"])
    command = [*arguments] or [
        "optimize", "-m", task["model"], "--provider", "CPUExecutionProvider", "--device", "cpu", "--precision",
        "fp32", "-o", str(folder / "made"), "--disable_telemetry",
    ]  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    program = str(Path(task["olive"]).parent / "olive")
    done = subprocess.run([program, *command], cwd=folder, env=env, capture_output=True, text=True, check=False)
    made = sorted((folder / "made").rglob("*.onnx"))
    if done.returncode or not made:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"olive ended with {done.returncode}: {lines[-1] if lines else 'no output'}")
    return {"kind": "onnxruntime", "file": str(made[0])}


def olive_config(task: Task, passes: dict[str, Any]) -> Task:
    folder = Path(task["out"])
    (folder / "calibration_data.py").write_text(OLIVE_DATA)
    config = {
        "input_model": {"type": "OnnxModel", "model_path": task["model"]},
        "systems": {
            "host": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "calibration",
                "type": "DataContainer",
                "user_script": str(folder / "calibration_data.py"),
                "load_dataset_config": {"type": "calibration_rows", "path": task["calibration"]},
                "pre_process_data_config": {"type": "skip_pre_process"},
                "post_process_data_config": {"type": "skip_post_process"},
                "dataloader_config": {"batch_size": CALIBRATION_BATCH},
            }
        ],
        "passes": passes,
        "target": "host",
        "output_dir": str(folder / "made"),
        "cache_dir": str(folder / "cache"),
    }
    (folder / "olive.json").write_text(json.dumps(config))
    return olive(task, "run", "--config", str(folder / "olive.json"), "--disable_telemetry")


def olive_dynamic(task: Task) -> Task:
    return olive_config(task, {"int8": {"type": "OnnxDynamicQuantization"}})


def olive_static(task: Task) -> Task:
    return olive_config(task, {"int8": {"type": "OnnxStaticQuantization", "data_config": "calibration"}})


PEERS: dict[str, Callable[[Task], Task]] = {
    "ort": ort,
    "ort-dynamic": ort_dynamic,
    "ort-static": ort_static,
    "ort-static-matmul": ort_static_matmul,
    "openvino": openvino,
    "nncf": nncf_int8,
    "olive": olive,
    "olive-dynamic": olive_dynamic,
    "olive-static": olive_static,
}
LABELS = {
    "ort": "ONNX Runtime",
    "ort-dynamic": "ORT dynamic int8",
    "ort-static": "ORT QDQ int8",
    "ort-static-matmul": "ORT QDQ int8, MatMul only",
    "openvino": "OpenVINO",
    "nncf": "OpenVINO + NNCF int8",
    "olive": "Olive optimize",
    "olive-dynamic": "Olive dynamic int8",
    "olive-static": "Olive static int8",
    "anneal": "Anneal",
}
FOR_TRANSFORMERS = ("ort-static-matmul",)  # the documentation's advice for models of attention


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    engine = PEERS[given["peer"]](given)
    (Path(given["out"]) / "engine.json").write_text(json.dumps(engine))
