"""Engines that are signed: another installation key is another stage key, so that they are built anew, not refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from workers.installation import KEY_BYTES, Installation
from workers.pipeline.protocol import Limits, StageRequest
from workers.pipeline.runner import StageRunner


def keys(letter: bytes, options: dict[str, Any]) -> str:
    """How a runner with such an installation key names the machine in a stage key."""
    runner = StageRunner(
        claim=cast("Any", SimpleNamespace(job_id="j", tenant_id="t")),
        ledger=cast("Any", None),
        isolated=cast("Any", None),
        workspace=cast("Any", None),
        hardware={},
        fingerprint="machine",
        limits=Limits(1, 1, 1),
        lock_dir=Path(),
        should_stop=lambda: False,
        installation=Installation(letter * KEY_BYTES),
    )
    return runner._hardware(options)


def test_the_key_counts_where_engines_are_signed() -> None:
    plans = {"backend": "tensorrt"}
    assert keys(b"a", plans) == keys(b"a", plans) != keys(b"b", plans)
    assert keys(b"a", {"engines": [{"backend": "tensorrt"}]}) != keys(b"b", {"engines": [{"backend": "tensorrt"}]})
    assert keys(b"a", {"backend": "onnxruntime"}) == keys(b"b", {"backend": "onnxruntime"}) == "machine"


def test_a_request_hands_it_over() -> None:
    handed = Installation(b"a" * KEY_BYTES, Path("/cache"))
    request = StageRequest("build", {}, {}, "w", "o", {}, Limits(1, 1, 1), handed.to_json())
    assert Installation.from_json(StageRequest.decode(request.encode()).installation) == handed
    assert StageRequest.decode(StageRequest("b", {}, {}, "w", "o", {}, Limits(1, 1, 1)).encode()).installation == {}
