"""Importing this module installs the stand-ins: what `IsolatedRunner` is given, so that the children of stage
calls have them. Graphs with certain ops fail in certain ways.

The baseline of a GPU job is ONNX Runtime on CUDA; here its CPU provider stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tests.factories import cuda_standin, tensorrt_standin
from workers import kernel
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.candidates import Candidate, Case, Proposal

_BASELINE = "onnxruntime-cuda"

kernel.backends()
kernel._BACKENDS.pop(_BASELINE, None)


class CudaBaseline(OnnxRuntimeBackend):
    name: ClassVar[str] = _BASELINE

    def probe(self, hardware: Mapping[str, Any]) -> kernel.BackendInfo | None:
        return kernel.BackendInfo(_BASELINE, {"onnxruntime": "stand-in"}, ("cuda",), ("fp32",))

    def propose(self, case: Case) -> Proposal:
        return Proposal()

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return ()


tensorrt_standin.behaviour = tensorrt_standin.Behaviour(
    unknown_ops=frozenset({"Celu"}),
    build_error_ops={"Elu": "Could not find any implementation for node act."},
    slow_ops={"Selu": 5.0},
)
cuda_standin.install()
