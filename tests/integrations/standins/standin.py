"""What both stand-ins share: Triton batches, warms up and schedules as ever, and hands the requests to a script instead
of to its own C++ code. Parameters that the C++ code does not know fail here."""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils


class Standin:
    known: ClassVar[dict] = {}  # parameter → what its text becomes

    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config["parameters"].items()}
        parameters = {name: self.known[name](text) for name, text in given.items()}
        self.inputs = [item["name"] for item in config["input"]]
        self.outputs = [item["name"] for item in config["output"]]
        self.run = self.loaded(Path(args["model_repository"]) / args["model_version"], parameters, config)

    def execute(self, requests):
        parts = [{n: pb_utils.get_input_tensor_by_name(r, n).as_numpy() for n in self.inputs} for r in requests]
        if len(parts) == 1:
            return [self.response(self.run(parts[0]))]
        results = self.run({n: np.concatenate([p[n] for p in parts]) for n in self.inputs})
        ends = np.cumsum([len(p[self.inputs[0]]) for p in parts])
        return [
            self.response({n: results[n][a:b] for n in self.outputs}) for a, b in zip([0, *ends], ends, strict=False)
        ]

    def response(self, found):
        tensors = [pb_utils.Tensor(n, np.ascontiguousarray(found[n])) for n in self.outputs]
        return pb_utils.InferenceResponse(tensors)
