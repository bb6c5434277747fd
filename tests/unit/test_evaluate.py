"""What a stage call of a candidate is given, and what is remembered of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from workers.candidates import Step
from workers.pipeline.budget import Budget
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.job_data import Data

SPEC = OptimizationSpec.model_validate({"model_id": "m", "calibration": {"dataset_id": "d"}})


class Runner:
    """Answers every call with an output of its own, and keeps what it was asked."""

    def __init__(self, *also: str) -> None:
        self.also = also
        self.calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []

    def run(self, stage: str, inputs: dict[str, Any], options: dict[str, Any], **_: Any) -> Any:
        self.calls.append((stage, dict(inputs), dict(options)))
        outputs = {name: f"{name} {len(self.calls)}" for name in ("model", *self.also)}
        return SimpleNamespace(stage=stage, key=f"key {len(self.calls)}", outputs=outputs, seconds=1.0)


def evaluator(runner: Runner) -> Evaluator:
    export: Any = SimpleNamespace(key="export", of_kind=lambda *_: "exported")
    data: Any = Data("calibration set", None, False, None)  # type: ignore[arg-type]
    return Evaluator(runner, SPEC, export, data, Budget(60.0), "onnxruntime")  # type: ignore[arg-type]


def quantize(stage: str, excluded: list[str], **options: Any) -> Step:
    return Step(stage, {"method": "minmax", "exclude_nodes": excluded, **options}, ("calibration",))


@pytest.mark.parametrize(
    ("stage", "also", "given"), [("quantize_nncf", (), "quantized"), ("quantize", ("ranges",), "ranges")]
)
def test_keeping_nodes_starts_from_what_was_quantized_before(stage: str, also: tuple[str, ...], given: str) -> None:
    runner = Runner(*also)
    made = evaluator(runner)
    first = quantize(stage, [])
    assert not made.quantized_before(first, made.export)
    made.graph_step(first, made.export, "a", 30.0)
    assert made.quantized_before(quantize(stage, ["n1"]), made.export)
    made.graph_step(quantize(stage, ["n1"]), made.export, "a.keep1", 30.0)
    made.graph_step(quantize(stage, ["n1", "n2"]), made.export, "a.keep2", 30.0)
    made.graph_step(quantize(stage, []), made.export, "without", 30.0)
    made.graph_step(quantize(stage, ["n1"], method="percentile"), made.export, "b", 30.0)
    name = "ranges 1" if given == "ranges" else "model 1"
    assert [inputs.get(given) for _, inputs, _ in runner.calls] == [None, name, name, None, None]
    assert all(inputs["calibration"] == "calibration set" for _, inputs, _ in runner.calls)
