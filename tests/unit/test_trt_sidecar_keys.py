"""Engines that are signed: another installation key is another stage key, so that they are built anew, not refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app.domain.failures import model_failure
from workers import kernel
from workers.installation import KEY_BYTES, Installation
from workers.pipeline import keys as of_call
from workers.pipeline.protocol import Limits, StageRequest
from workers.pipeline.stage_calls import StageCall


def keys(letter: bytes, options: dict[str, Any], stage: str = "benchmark", machine: str = "machine") -> str:
    """How a machine with such an installation key is named in a stage key."""
    key_id = Installation(letter * KEY_BYTES).key_id
    return of_call.hardware(kernel.stages()[stage], options, {}, machine, key_id)


def test_the_key_counts_where_engines_are_signed() -> None:
    plans = {"backend": "tensorrt"}
    assert keys(b"a", plans) == keys(b"a", plans) != keys(b"b", plans)
    assert keys(b"a", {"engines": [{"backend": "tensorrt"}]}) != keys(b"b", {"engines": [{"backend": "tensorrt"}]})
    assert keys(b"a", {"backend": "onnxruntime"}) == keys(b"b", {"backend": "onnxruntime"}) == "machine"


def test_what_is_built_for_a_target_has_the_key_of_no_machine() -> None:
    """So that the worker with the GPU finds what another built; unless that one signs with another key."""
    rtx = {"backend": "tensorrt-rtx", "options": {"target": "8.9"}}
    assert keys(b"a", rtx, "build") == keys(b"a", rtx, "build", machine="another")
    assert keys(b"a", rtx, "build") != keys(b"b", rtx, "build")
    assert keys(b"a", rtx, "build") != keys(b"a", {**rtx, "options": {"target": "8.6"}}, "build")
    for options in ({"backend": "tensorrt-rtx"}, {"backend": "tensorrt", "options": {"target": "8.9"}}):
        assert keys(b"a", options, "build") != keys(b"a", options, "build", machine="another")
    assert keys(b"a", {"backend": "tensorrt-rtx"}) != keys(b"a", {"backend": "tensorrt-rtx"}, machine="another")


def test_a_graph_has_the_key_of_no_package_for_gpus() -> None:
    """Calibrations take the most time of what is built ahead, and the GPU's worker has `onnxruntime-gpu`."""
    here, there = {"onnxruntime": "1.31.1", "onnx": "1.20"}, {"onnxruntime-gpu": "1.31.1", "onnx": "1.20"}
    for name in ("export", "simplify", "convert", "quantize"):
        stage = kernel.stages()[name]
        assert of_call.in_key(stage, here) == of_call.in_key(stage, there)
    for name in ("build", "benchmark", "validate"):
        stage = kernel.stages()[name]
        assert of_call.in_key(stage, here) != of_call.in_key(stage, there)


def test_a_builder_that_crashes_condemns_no_target() -> None:
    """An instruction that its processor has not, say: the GPU's worker, under the same key, tries by itself."""
    crash, refusal = model_failure("runtime_crashed", "SIGILL"), model_failure("parse_failed", "no such operator")
    for options, kept in (({"target": "8.9"}, False), ({}, True)):
        call: Any = SimpleNamespace(
            stage_type=kernel.stages()["build"], options={"backend": "tensorrt-rtx", "options": options}
        )
        assert StageCall.lasting(call, crash) is kept
        assert StageCall.lasting(call, refusal)


def test_a_request_hands_it_over() -> None:
    handed = Installation(b"a" * KEY_BYTES, Path("/cache"))
    request = StageRequest("build", {}, {}, "w", "o", {}, Limits(1, 1, 1), handed.to_json())
    assert Installation.from_json(StageRequest.decode(request.encode()).installation) == handed
    assert StageRequest.decode(StageRequest("b", {}, {}, "w", "o", {}, Limits(1, 1, 1)).encode()).installation == {}
