"""Which parts a shipped engine has, and the configuration that lacks each."""

from __future__ import annotations

from typing import Any

from workers.candidates import Candidate, Step
from workers.pipeline.ablation import Part, alone, parts

SIMPLIFY = Step("simplify", {"fusions": False})
QUANTIZE = Step("quantize", {"recipe": "static_int8", "exclude_nodes": ["n1", "n2"]}, ("calibration",))
NNCF = Step("quantize_nncf", {"preset": "mixed"}, ("calibration",))


def _candidate(steps: tuple[Step, ...], backend: str = "onnxruntime", **more: Any) -> Candidate:
    return Candidate("c", "c", backend, "int8", steps, **more)


def _names(found: list[Part]) -> list[str]:
    return [p.name for p in found]


def test_every_part_is_left_out_once() -> None:
    picked = _candidate((SIMPLIFY, Step("equalize", {}), QUANTIZE), runtime={"intra_op_num_threads": 1})
    found = parts(picked, [], {}, "onnxruntime")
    assert _names(found) == [
        "ONNX simplification",
        "equalization of activations and weights",
        "quantization (static int8)",
        "2 sensitive nodes kept in higher precision",
        "runtime options (intra_op_num_threads=1)",
    ]
    without = [p.without for p in found]
    assert [[s.stage for s in c.steps] for c in without if c] == [
        ["equalize", "quantize"],
        ["simplify", "quantize"],
        ["simplify"],
        ["simplify", "equalize", "quantize"],
        ["simplify", "equalize", "quantize"],
    ]
    assert without[3] is not None
    assert without[3].steps[2].options["exclude_nodes"] == []
    assert without[4] is not None
    assert without[4].runtime == {}
    assert len({c.id for c in without if c}) == len(without)


def test_fusions_are_a_part_of_their_own() -> None:
    (part,) = parts(_candidate((Step("simplify", {"fusions": True}),)), [], {}, "onnxruntime")
    assert part.name == "transformer fusions"
    assert part.without is not None
    assert part.without.steps == (SIMPLIFY,)


def test_another_backend_is_held_against_the_nearest_that_onnxruntime_runs() -> None:
    picked = _candidate((SIMPLIFY, NNCF), "openvino", runtime={"inference_precision": "bf16"})
    theirs = _candidate((SIMPLIFY, QUANTIZE))
    found = parts(picked, [picked, theirs], {"inference_precision": "f32"}, "onnxruntime")
    backend = next(p for p in found if "in place of" in p.name)
    assert backend.without is not None
    assert backend.without.steps == theirs.steps
    assert "nearest" in str(backend.reason)
    arithmetic = next(p for p in found if "arithmetic" in p.name)
    assert arithmetic.without is not None
    assert arithmetic.without.runtime == {"inference_precision": "f32"}
    alone = next(p for p in parts(picked, [picked], {}, "onnxruntime") if "in place of" in p.name)
    assert alone.without is None
    assert "no int8 configuration" in str(alone.reason)


def test_engines_of_a_chain_have_the_parts_of_each() -> None:
    """Their runtime options are named as those of one engine are, and left out in all of them."""
    each = {"inference_precision": "bf16", "threads": 1}
    picked = _candidate((SIMPLIFY,), "openvino", runtime=each).linked("chained")
    assert picked.recipe == "simplify → build [inference_precision=bf16, threads=1]"
    assert alone(picked) == _candidate((SIMPLIFY,), "openvino", runtime=each)
    found = parts(picked, [], {"inference_precision": "f32"}, "onnxruntime")
    assert _names(found) == [
        "ONNX simplification",
        "an engine of each model in place of one of the whole",
        "bf16 arithmetic for what is not quantized",
        "runtime options (threads=1)",
    ]
    without = [p.without for p in found]
    assert [c.backend for c in without if c] == ["chained", "openvino", "chained", "chained"]
    assert [c.runtime for c in without if c] == [
        {"each": each},
        each,
        {"each": {"inference_precision": "f32", "threads": 1}},
        {"each": {"inference_precision": "bf16"}},
    ]
