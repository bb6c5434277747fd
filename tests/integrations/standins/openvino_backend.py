"""Stands in for Triton's own C++ backend of OpenVINO, on a processor that computes in float32 by itself."""

from typing import ClassVar

import numpy as np
import openvino
from standin import Standin


class TritonPythonModel(Standin):
    known: ClassVar[dict] = {
        "PERFORMANCE_HINT": lambda text: {"LATENCY": text, "THROUGHPUT": text}[text],
        "HINT_BF16": lambda text: {"YES": True}[text],
        "NUM_STREAMS": int,
        "INFERENCE_NUM_THREADS": int,
    }

    def loaded(self, folder, parameters, config):
        properties = {name: value for name, value in parameters.items() if name != "HINT_BF16"}
        properties["INFERENCE_PRECISION_HINT"] = "bf16" if parameters.get("HINT_BF16") else "f32"
        compiled = openvino.Core().compile_model(str(folder / "model.xml"), "CPU", properties)
        # Like the C++ code, by name.
        inputs = {name: compiled.input(name) for name in self.inputs}
        outputs = {name: compiled.output(name) for name in self.outputs}

        def run(feeds):
            found = compiled({inputs[name]: array for name, array in feeds.items()})
            return {name: np.array(found[port]) for name, port in outputs.items()}

        return run
