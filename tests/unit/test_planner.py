"""Candidates follow from the graph, the hardware and the data, by the rules that were measured."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from workers.backends.onnxruntime import OnnxRuntimeBackend
from workers.candidates import Candidate, Case, Proposal, Step
from workers.pipeline.planner import Plan, plan

CNN = {"Conv": 20, "Relu": 18, "Add": 8, "Gemm": 1, "GlobalAveragePool": 1}
TRANSFORMER = {"MatMul": 48, "Softmax": 6, "LayerNormalization": 12, "Add": 60, "Gather": 3}


def _plan(ops: dict[str, int], kind: str, *, calibration: bool = True, **changes: Any) -> Plan:
    body: dict[str, Any] = {"model_id": "mdl_x", **changes.pop("spec", {})}
    if calibration:
        body.setdefault("calibration", {"dataset_id": "dst_x"})
    facts: dict[str, Any] = {"isa": ["avx512_vnni"], "cores": 2, "has_calibration": calibration, **changes}
    case = Case(OptimizationSpec.model_validate(body), ops, kind, **facts)
    return plan(case, {"onnxruntime": OnnxRuntimeBackend()})


def _ids(found: Plan) -> list[str]:
    return sorted(c.id for c in found.candidates)


def _quantize(found: Plan, cid: str) -> dict[str, Any]:
    (step,) = [s for c in found.candidates if c.id == cid for s in c.steps if s.stage == "quantize"]
    return dict(step.options)


def test_convolutions_are_quantized_statically_never_dynamically() -> None:
    found = _plan(CNN, "cnn")
    assert _ids(found) == ["ort-fp32", "ort-int8-static"]
    assert "Conv" in _quantize(found, "ort-int8-static")["op_types"]
    assert _quantize(found, "ort-int8-static")["activations"] == "uint8"


def test_transformers_quantize_their_products_only() -> None:
    found = _plan(TRANSFORMER, "transformer")
    assert _ids(found) == ["ort-fp32", "ort-fp32-fused", "ort-int8-dynamic", "ort-int8-static"]
    assert _quantize(found, "ort-int8-static")["op_types"] == ["MatMul"]
    assert _quantize(found, "ort-int8-dynamic")["op_types"] == ["MatMul"]


def test_without_calibration_data_there_is_no_static_int8_and_the_reason_is_said() -> None:
    found = _plan(CNN, "cnn", calibration=False)
    assert _ids(found) == ["ort-fp32"]
    assert "calibration data" in next(s.reason for s in found.skipped if s.name == "ort-int8-static")


def test_a_worker_without_pytorch_says_what_a_program_would_bring() -> None:
    """Figures are those of models of this class on this kind of hardware, or there are none."""

    def told(kind: str, **changes: Any) -> list[str]:
        found = _plan(CNN, kind, **changes)
        return [s.reason for s in found.skipped if s.name == "Torch Inductor"]

    h100 = {"gpu": {"compute_capability": "9.0"}}
    (reason,) = told("cnn", hardware=h100)
    assert "a worker that has PyTorch, in fp32 and fp16 and bf16" in reason
    assert "in one run on an NVIDIA H200; docs/gpu-figures.md" in reason
    assert "ResNet-50 0.355 ms to 0.518 at batch 1" in reason
    assert "BERT-base" in told("transformer", hardware=h100)[0]
    assert told("rnn", hardware=h100)[0].endswith("was not measured for models of this class.")
    assert told("cnn", hardware={"gpu": {"compute_capability": "8.6"}})[0].endswith("GPU was not measured.")
    assert "Inductor was the slower one; not measured in bf16; docs/figures.md" in told("cnn")[0]
    assert told("cnn", spec={"target": {"backends": ["onnxruntime"]}}) == []
    (reason,) = told("cnn", hardware=h100, spec={"chain": {"then": [{"model_id": "mdl_y"}]}})
    assert "those uploaded as .pt2, too" in reason, "of a chain nothing is promised that it would not get"
    assert "H200" not in reason


def test_without_dot_product_instructions_the_range_is_reduced() -> None:
    assert not _quantize(_plan(CNN, "cnn"), "ort-int8-static")["reduce_range"]
    assert _quantize(_plan(CNN, "cnn", isa=["avx2"]), "ort-int8-static")["reduce_range"]


def test_a_quantized_model_is_not_quantized_again() -> None:
    assert _ids(_plan(CNN, "cnn", quantized=True)) == ["ort-fp32"]


def test_one_data_set_for_both_is_split() -> None:
    assert _quantize(_plan(CNN, "cnn"), "ort-int8-static")["part"] == "all"
    assert _quantize(_plan(CNN, "cnn", same_data=True), "ort-int8-static")["part"] == "calibration"


def test_only_the_wanted_precisions_are_tried() -> None:
    assert _ids(_plan(CNN, "cnn", spec={"precisions": ["fp32"]})) == ["ort-fp32"]
    assert _ids(_plan(CNN, "cnn", spec={"precisions": ["int8"]})) == ["ort-int8-static"]


def test_candidates_are_unique() -> None:
    ids = _ids(_plan(TRANSFORMER, "transformer"))
    assert len(set(ids)) == len(ids)


class _Proposing(OnnxRuntimeBackend):
    """As a backend of another package may be."""

    name = "test-proposing"

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def propose(self, case: Case) -> Proposal:
        if not self.steps:
            raise ZeroDivisionError("a fault of its own")
        return Proposal((Candidate("x", "theirs", self.name, "fp32", self.steps),))


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([Step("quantize_nncf", {}), Step("simplify", {})], "simplify takes onnx, and there is openvino-ir"),
        ([Step("quantize_nncf", {})], "test-proposing builds from onnx, and there is openvino-ir"),
        ([Step("validate", {})], "test-proposing builds from onnx, and there is nothing"),
        ([Step("no_such", {})], "this worker has no stage 'no_such'"),
        ([], "its proposal failed: ZeroDivisionError: a fault of its own"),
    ],
)
def test_what_does_not_fit_together_is_not_tried(steps: list[Step], reason: str) -> None:
    case = Case(OptimizationSpec.model_validate({"model_id": "mdl_x"}), CNN, "cnn")
    found = plan(case, {"onnxruntime": OnnxRuntimeBackend(), "test-proposing": _Proposing(*steps)})
    assert reason in [s.reason for s in found.skipped]
    assert _ids(found) == ["ort-fp32"], "the others go on"
