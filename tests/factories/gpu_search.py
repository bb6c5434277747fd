"""A search on a GPU, written down without one:

    python -m tests.factories.gpu_search > tests/data/searches/gpu-bert.jsonl

The candidates and their variants are what the backend proposes for a BERT-base on an H100; what each would show is from
docs/gpu-figures.md, where ONNX Runtime's CUDA provider was measured on that GPU (128 tokens, batch sizes 1 and 8). It
has no figures of the fused graphs without a CUDA graph, nor of bfloat16: they stand here as the graphs that are not
fused, and as float16. Seconds and losses are made up.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from app.domain.spec import OptimizationSpec
from tests.factories.search_world import Truth, World
from workers.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend
from workers.candidates import Candidate, Case
from workers.pipeline.planner import plan
from workers.search.policy import Policy

# Gains over the provider's default at batch 1 and 8: without a CUDA graph, and with one.
MEASURED = {
    "ortcuda-fp32": ((1.0, 1.0), (2.78, 1.79)),
    "ortcuda-fp32-fused": ((1.0, 1.0), (3.13, 2.17)),
    "ortcuda-fp16": ((0.88, 1.10), (3.26, 2.38)),
    "ortcuda-fp16-fused": ((0.88, 1.10), (4.39, 3.48)),
    "ortcuda-bf16": ((0.88, 1.10), (3.26, 2.38)),
}
GPU = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "memory_bytes": 80 << 30}


@dataclass
class OnGpu(World):
    """`World`, of these candidates."""

    def candidates(self) -> list[Candidate]:
        ops = {"MatMul": 96, "Softmax": 12, "LayerNormalization": 25, "Gather": 3}
        case = Case(self.spec, ops, "transformer", hardware={"gpu": GPU}, has_calibration=True, cores=8, device="cuda")
        self.case = case
        return [*plan(case, {"onnxruntime-cuda": OnnxRuntimeCudaBackend()}).candidates]

    def policy(self) -> Policy:
        self.candidates()
        backend = OnnxRuntimeCudaBackend()
        return Policy(self.facts(), lambda c: backend.variants(self.case, c), lambda calls: 5.0 * (len(calls) + 1))

    def _figures(self, plan: Candidate, sizes: tuple[int, ...]) -> dict[str, Any]:
        at = dict(zip((1, 8), MEASURED[plan.id.split(".")[0]]["graph" in plan.id.split(".")], strict=True))
        return {"batches": {str(b): self._at(at[b], b) for b in sizes}}


def world() -> OnGpu:
    spec = OptimizationSpec.model_validate(
        {
            "model_id": "m",
            "calibration": {"dataset_id": "d"},
            "target": {"device": "cuda"},
            "benchmark": {"batch_sizes": [1, 8]},
        }
    )
    losses = {"fp32": 0.0, "fp16": 0.02, "bf16": 0.2}
    truths = {cid: Truth(loss=losses[cid.split("-")[1]], seconds=8.0, size=200_000_000) for cid in MEASURED}
    return OnGpu(truths, spec, call_ms=3.4, variants=())


if __name__ == "__main__":
    sys.stdout.writelines(world().recorded())
