"""The `model.py` of a model that Triton's Python backend runs: it loads the bundle's own `infer.py`. Needs nothing of
this package."""

from __future__ import annotations

MODEL = '''"""Runs the engine beside this file by its own infer.py, for Triton's Python backend."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config  # config.pbtxt says it all

    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.batched = config["max_batch_size"] > 0
        self.inputs = [item["name"] for item in config["input"]]
        # Of no axis at all, for which Triton has [1].
        scalars = config.get("parameters", {}).get("SCALARS", {}).get("string_value", "[]")
        self.scalars = set(json.loads(scalars))
        self.outputs = [
            (item["name"], pb_utils.triton_string_to_numpy(item["data_type"])) for item in config["output"]
        ]
        script = Path(__file__).resolve().with_name("infer.py")
        spec = importlib.util.spec_from_file_location("infer", script)
        infer = importlib.util.module_from_spec(spec)
        sys.modules["infer"] = infer
        spec.loader.exec_module(infer)
        _, self.run = infer.load()

    def execute(self, requests):
        feeds = [{n: self.array(request, n) for n in self.inputs} for request in requests]
        answers = [None] * len(feeds)
        for members in self.groups(feeds):
            for index, answer in zip(members, self.answered([feeds[i] for i in members])):
                answers[index] = answer
        return answers

    def array(self, request, name):
        found = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
        return found.reshape(()) if name in self.scalars else found

    def groups(self, feeds):
        """Which requests run together: those of the same sizes but for the batch."""
        found = {}
        for index, given in enumerate(feeds):
            shapes = tuple(given[n].shape[1:] for n in self.inputs) if self.batched else index
            found.setdefault(shapes, []).append(index)
        return found.values()

    def answered(self, feeds):
        """A response for each; where a batch fails, each of it runs alone, so that one spoils none but itself."""
        try:
            if len(feeds) == 1:
                return [self.response(self.run(feeds[0]))]
            whole = self.run({n: np.concatenate([f[n] for f in feeds]) for n in self.inputs})
            ends = np.cumsum([f[self.inputs[0]].shape[0] for f in feeds])
            starts = [0, *ends[:-1]]
            return [self.response({n: whole[n][a:b] for n, _ in self.outputs}) for a, b in zip(starts, ends)]
        except Exception as error:
            if len(feeds) > 1:
                return [self.answered([f])[0] for f in feeds]
            message = f"{type(error).__name__}: {error}"[:500]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError(message))]

    def response(self, found):
        tensors = [pb_utils.Tensor(n, np.ascontiguousarray(found[n], dtype=kind)) for n, kind in self.outputs]
        return pb_utils.InferenceResponse(tensors)
'''
