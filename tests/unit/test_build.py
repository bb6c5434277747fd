"""Stage build with the real ONNX Runtime backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from tests.factories import onnx_models as models
from workers.kernel import Reporter, StageContext, StageResult, backends
from workers.pipeline import keys
from workers.stages.build import Build, BuildStageOptions


class Silent(Reporter):
    def progress(self, fraction: float, message: str = "") -> None:
        pass

    def note(self, message: str, **facts: Any) -> None:
        pass


def build(tmp_path: Path, **options: Any) -> StageResult:
    source = models.folder(models.conv_net(), tmp_path / "model")
    (tmp_path / "work").mkdir()
    context = StageContext({"model": source}, tmp_path / "work", tmp_path / "out", Silent(), {"isa": ["avx2"]})
    return Build().run(context, BuildStageOptions(**options))


def test_build_makes_an_engine_that_loads(tmp_path: Path) -> None:
    result = build(tmp_path, backend="onnxruntime", options={"intra_op_num_threads": 1})
    assert result.outputs == ("engine",)
    data = result.data
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["engine_format"] == "onnx"
    assert data["runtime"] == {"graph_optimization_level": "disable", "intra_op_num_threads": 1}
    assert set(data["versions"]) == {"onnxruntime"}
    engine = tmp_path / "out" / "engine"
    assert data["size_bytes"] == sum(p.stat().st_size for p in engine.iterdir())
    session = backends()["onnxruntime"]().load(engine, data["runtime"])
    assert [i.name for i in session.inputs] == ["input"]


def test_unknown_backend(tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as caught:
        build(tmp_path, backend="abacus")
    assert (caught.value.code, caught.value.kind) == ("unknown_backend", FailureKind.REQUEST)
    assert "onnxruntime" in (caught.value.remedy or "")


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(StageFailure) as caught:
        build(tmp_path, backend="onnxruntime", options={"intra_op_num_threads": -1})
    assert (caught.value.code, caught.value.kind) == ("invalid_backend_options", FailureKind.REQUEST)


def test_build_is_hardware_bound_and_its_key_holds_the_backends_own_libraries() -> None:
    assert Build.hardware_bound
    assert "onnxruntime" in keys.libraries(Build, {"backend": "onnxruntime"})
    assert "onnxruntime" not in keys.libraries(Build, {"backend": "openvino"}), "which has no part in it"
