"""Stands in for Triton's own C++ backend of ONNX Runtime."""

from typing import ClassVar

import onnxruntime
from standin import Standin


def flag(text):
    return {"0": False, "1": True}[text]


class TritonPythonModel(Standin):
    known: ClassVar[dict] = {
        "intra_op_thread_count": int,
        "inter_op_thread_count": int,
        "execution_mode": flag,
        "enable_mem_arena": flag,
        "enable_mem_pattern": flag,
    }

    def loaded(self, folder, parameters, config):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = parameters.get("intra_op_thread_count", 0)
        options.inter_op_num_threads = parameters.get("inter_op_thread_count", 0)
        if parameters.get("execution_mode"):
            options.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        options.enable_cpu_mem_arena = parameters.get("enable_mem_arena", True)
        options.enable_mem_pattern = parameters.get("enable_mem_pattern", True)
        levels = onnxruntime.GraphOptimizationLevel
        named = {"0": levels.ORT_ENABLE_ALL, "-1": levels.ORT_ENABLE_BASIC, "1": levels.ORT_ENABLE_EXTENDED}
        level = str(config.get("optimization", {}).get("graph", {}).get("level", 0))
        options.graph_optimization_level = {**named, "2": levels.ORT_DISABLE_ALL}[level]
        session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        return lambda feeds: dict(zip(self.outputs, session.run(self.outputs, feeds), strict=True))
