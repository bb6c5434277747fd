"""Attention as exporters of torch write it becomes one operator, unless that changes a value."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxslim
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.factories.architectures import GraphBuilder
from tests.unit.test_simplify import run
from workers.graph.equivalence import EquivalenceCheck
from workers.graph.fuse import attention
from workers.graph.fuse.attention_dims import inferred
from workers.graph.interpreter import open_session
from workers.graph.precision.floats import to_low

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`")


def exported(name: str, how: str, folder: Path) -> ModelProto:
    from tests.factories import attentions

    spelling, exporter, opset = how.split("-")
    return attentions.export(name, spelling, exporter, int(opset), folder)  # type: ignore[arg-type]


def fused(model: ModelProto, folder: Path) -> attention.Fused:
    return attention.fuse(model, EquivalenceCheck(model, None, folder).outputs)


def multi_heads(model: ModelProto) -> list[dict[str, Any]]:
    nodes = [n for n in model.graph.node if n.op_type == "MultiHeadAttention"]
    return [{a.name: helper.get_attribute_value(a) for a in n.attribute} | {"inputs": len(n.input)} for n in nodes]


def answers(model: ModelProto, feeds: dict[str, Any]) -> Any:
    return open_session(model.SerializeToString()).run(None, feeds)[0]


TODAY, OPERATOR, SCRIPTED, OLD = "sdpa-dynamo-18", "sdpa-dynamo-23", "sdpa-torchscript-17", "eager-torchscript-14"


@needs_torch
@pytest.mark.parametrize(
    ("name", "how", "attentions", "causal"),
    [  # two layers each
        ("bert", TODAY, 2, 0),
        ("bert", OPERATOR, 2, 0),
        ("bert", OLD, 2, 0),
        ("vit", TODAY, 2, 0),
        ("vit", OPERATOR, 2, 0),
        ("vit", OLD, 2, 0),
        ("gpt2", TODAY, 2, 2),
        ("gpt2", OPERATOR, 2, 2),
        ("gpt2", OLD, 2, 2),
        ("gpt2_merged", TODAY, 2, 2),
        ("gpt2_merged", OPERATOR, 2, 2),
        ("gpt2_merged", SCRIPTED, 2, 2),
        ("gpt2_merged", OLD, 2, 2),
        ("padded_gpt2", TODAY, 2, 0),
        ("padded_gpt2", OPERATOR, 2, 0),
        ("padded_gpt2", SCRIPTED, 2, 0),
        ("clip_text", TODAY, 2, 2),
        ("clip_text", OPERATOR, 2, 2),
        ("clip_text", OLD, 2, 2),
        ("clip_padded", TODAY, 2, 0),
        ("clip_padded", OLD, 2, 0),
        ("windowed", TODAY, 2, 0),
        ("shifted", TODAY, 2, 0),
        ("whisper_encoder", TODAY, 2, 0),
        ("whisper_encoder", OPERATOR, 2, 0),
        ("whisper_encoder", OLD, 2, 0),
        ("whisper_decoder", TODAY, 4, 2),
        ("whisper_decoder", OPERATOR, 4, 2),
        ("whisper_decoder", OLD, 4, 2),
        ("t5", TODAY, 2, 0),
        ("t5", OPERATOR, 2, 0),
        ("t5", OLD, 2, 0),
        ("flattened", TODAY, 2, 0),
        ("flattened", OLD, 2, 0),
        ("decoder", TODAY, 4, 2),
        ("decoder", OLD, 4, 2),
        ("masked_decoder", TODAY, 4, 0),
        ("masked_decoder", OPERATOR, 4, 0),
        ("masked_decoder", SCRIPTED, 4, 0),
        ("masked_decoder", OLD, 4, 0),
        ("torch_layers", TODAY, 2, 0),
        # By opset 23 ONNX Runtime 1.32 does not run them: their mask has one row for all queries.
        ("torch_layers_of_12", SCRIPTED, 2, 0),
        ("torch_layers_of_12", OLD, 2, 0),
    ],
)
def test_attention_of_exporters_is_fused(name: str, how: str, attentions: int, causal: int, tmp_path: Path) -> None:
    original = exported(name, how, tmp_path)
    slim = onnxslim.slim(onnx.load_from_string(original.SerializeToString()))
    made = attention.fuse(slim, EquivalenceCheck(original, None, tmp_path).outputs, [original])
    assert (made.count, made.causal, made.left) == (attentions, causal, {})
    kinds = Counter(node.op_type for node in made.model.graph.node)
    assert kinds["MultiHeadAttention"] == attentions
    assert not kinds["Softmax"]
    assert not kinds["Attention"]
    assert sum(found["unidirectional"] for found in multi_heads(made.model)) == causal
    rng = np.random.default_rng(3)
    # 40 is longer than the window of `windowed`, and in the range of T5's logarithm; padding at the left leaves nothing
    # to the first queries.
    for batch, length in ((1, 2), (3, 40)):
        feeds = fed(original, batch, length, rng)
        wanted, found = answers(original, feeds), answers(made.model, feeds)
        assert np.isfinite(found).all()
        known = np.isfinite(wanted)  # a score of minus infinity for every key has no softmax in old exports
        assert known.mean() > 0.5
        np.testing.assert_allclose(found[known], wanted[known], atol=2e-5)


def test_queries_that_see_nothing_are_left_to_the_operator(tmp_path: Path) -> None:
    """Opset 23's operator answers a padded query of a causal model otherwise: the fusion is undone, and named."""
    original = exported("clip_padded", OPERATOR, tmp_path)
    slim = onnxslim.slim(onnx.load_from_string(original.SerializeToString()))
    made = attention.fuse(slim, EquivalenceCheck(original, None, tmp_path).outputs, [original])
    assert made.count == 0
    assert len(made.left) == 2
    assert all("its output differs" in reason for reason in made.left.values())


def fed(model: ModelProto, batch: int, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """Masks of the first sample hide the first half of its keys, or of its frames."""
    feeds: dict[str, Any] = {}
    for value in model.graph.input:
        dims = [d.dim_value or {"batch": batch, "frames": 7}.get(d.dim_param, length)
                for d in value.type.tensor_type.shape.dim]  # fmt: skip
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            feeds[value.name] = rng.standard_normal(dims).astype(np.float32)
        elif value.name.endswith("_mask"):
            feeds[value.name] = np.ones(dims, np.int64)
            feeds[value.name][0, : dims[1] // 2] = 0
        else:
            feeds[value.name] = rng.integers(0, 50, dims)
    return feeds


@needs_torch
@pytest.mark.parametrize(
    ("name", "how", "reason"),
    [
        ("softcapped", TODAY, "between its products and its Softmax stands Tanh"),
        ("softcapped", OLD, "between its products and its Softmax stands Tanh"),
        ("head_scaled", TODAY, "between its products and its Softmax stands a mask or factor of another kind"),
        ("head_scaled", OLD, "between its products and its Softmax stands a mask or factor of another kind"),
        ("talking_heads", TODAY, "between its products and its Softmax stands "),
        ("head_masked", TODAY, "its weights pass Mul"),
        ("head_masked", OLD, "its weights pass Mul"),
    ],
)
def test_almost_attention_stays_and_says_why(name: str, how: str, reason: str, tmp_path: Path) -> None:
    original = exported(name, how, tmp_path)
    made = fused(onnxslim.slim(onnx.load_from_string(original.SerializeToString())), tmp_path)
    assert made.count == 0
    assert len(made.left) == 2
    assert all(told.startswith(reason) for told in made.left.values()), made.left
    assert not made.undone


@needs_torch
def test_the_stage_counts_and_reports_it(tmp_path: Path) -> None:
    """Through `simplify`: what ONNX Runtime's optimizer does not see is fused by us, the rest by it."""
    made, data, _ = run(exported("t5", TODAY, tmp_path), tmp_path, fusions=True)
    assert data["attention"] == {"fused": 2, "causal": 0, "left": {}}
    assert data["fusions"]["attention"] == 2
    assert data["fusions"]["skip_layernorm"] > 0
    assert data["steps"] == ["onnxslim", "transformer fusions", "attention"]
    assert data["fell_back"] is None
    assert [found["scale"] for found in multi_heads(made)] == [1.0, 1.0]


@needs_torch
def test_for_a_gpu_it_is_converted_as_a_whole(tmp_path: Path) -> None:
    """The graph of the fp16 candidate: the operator takes and gives float16, its bias too."""
    made, _, _ = run(exported("bert", TODAY, tmp_path), tmp_path, fusions=True)
    half = to_low(onnx.shape_inference.infer_shapes(made), "fp16").model
    node = next(n for n in half.graph.node if n.op_type == "MultiHeadAttention")
    assert [name.endswith("_fp16") for name in node.input] == [True, True, True, False, False, True]
    assert node.output[0].endswith("_fp16")


# By hand: what no exporter writes today, and what only looks like attention.


def attending(
    *, scale: float = 0.35, masked: float | None = None, shift: float = 0.0, axis: int = -1, rank: int = 4
) -> ModelProto:
    """`x` [batch, 6, 8] attends to itself with two heads (rank 4), or with one (rank 3). `shift` is added to every
    score, by a feature of its own."""
    b = GraphBuilder(0)
    heads, size = (2, 4) if rank == 4 else (1, 8)
    q, k, v = (b.linear("x", p, 8, 8) for p in "qkv")
    if rank == 4:
        q, k, v = (b.add("Reshape", t, b.ints(0, 0, heads, size)) for t in (q, k, v))
        q, v = (b.add("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, v))
        k = b.add("Transpose", k, perm=[0, 2, 3, 1])
    else:
        k = b.add("Transpose", k, perm=[0, 2, 1])
    scores = b.add("Mul", b.add("MatMul", q, k), b.constant("scale", scale))
    if shift:
        scores = b.add("Add", scores, b.constant("shift", shift))
    if masked is not None:
        seen = b.constant("seen", np.tril(np.ones((6, 6), bool)), bool)
        scores = b.add("Where", seen, scores, b.constant("masked", masked))
    context = b.add("MatMul", b.add("Softmax", scores, axis=axis), v)
    if rank == 4:
        context = b.add("Reshape", b.add("Transpose", context, perm=[0, 2, 1, 3]), b.ints(0, 0, 8))
    b.add("Identity", context, outputs=["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6, 8])
    return b.model([x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6, 8])])


def operator(*, rank: int = 3, of_keys: int = 2, mask: Any = None, causal: int = 0) -> ModelProto:
    """`x` [batch, 6, 8] attends to itself by ONNX's own operator, of so many axes, with two heads."""
    b = GraphBuilder(0)
    q, k, v = (b.linear("x", p, 8, 8 if p == "q" else 4 * of_keys) for p in "qkv")
    if rank == 4:
        q, k, v = (
            b.add("Transpose", b.add("Reshape", t, b.ints(0, 0, heads, 4)), perm=[0, 2, 1, 3])
            for t, heads in ((q, 2), (k, of_keys), (v, of_keys))
        )
    told = {"q_num_heads": 2, "kv_num_heads": of_keys} if rank == 3 else {}
    given = [] if mask is None else [b.constant("mask", mask, np.asarray(mask).dtype)]
    context = b.add("Attention", q, k, v, *given, is_causal=causal, **told)
    if rank == 4:
        context = b.add("Reshape", b.add("Transpose", context, perm=[0, 2, 1, 3]), b.ints(0, 0, 8))
    b.add("Identity", context, outputs=["y"])
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 6, 8]) for n in "xy"]
    model = b.model(ends[:1], ends[1:])
    model.opset_import[0].version = 23
    model.ir_version = 11
    return model


_ADDED = np.random.default_rng(4).normal(size=(2, 6, 6)).astype(np.float32)  # of each head
_HIDDEN = np.arange(6) % 3 != np.arange(6)[:, None] % 3


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(
    ("options", "causal"),
    [({}, 0), ({"causal": 1}, 1), ({"mask": _ADDED}, 0), ({"mask": _ADDED[0]}, 0), ({"mask": _HIDDEN}, 0)],
)
def test_the_operator_of_three_axes_is_fused_as_that_of_four(
    rank: int, options: dict[str, Any], causal: int, tmp_path: Path
) -> None:
    original = operator(rank=rank, **options)
    made = fused(original, tmp_path)
    assert (made.count, made.causal, made.left) == (1, causal, {})
    (found,) = multi_heads(made.model)
    assert (found["num_heads"], found["unidirectional"]) == (2, causal)
    feeds = {"x": np.random.default_rng(5).standard_normal((3, 6, 8)).astype(np.float32)}
    np.testing.assert_allclose(answers(made.model, feeds), answers(original, feeds), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"of_keys": 1}, "its queries, keys and values are not of the same number of heads"),
        ({"of_keys": 1, "rank": 4}, "its queries, keys and values are not of the same number of heads"),
        ({"mask": _HIDDEN, "causal": 1}, "it is causal and has a mask"),
    ],
)
def test_what_the_fused_operator_has_not_is_left_and_said(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made = fused(operator(**options), tmp_path)
    assert (made.count, list(made.left.values())) == (0, [reason])


def test_a_fixed_length_is_causal_by_its_constant(tmp_path: Path) -> None:
    made = fused(attending(masked=-1e4), tmp_path)
    (found,) = multi_heads(made.model)
    assert found == {"num_heads": 2, "scale": pytest.approx(0.35), "unidirectional": 1, "inputs": 3}


def test_three_axes_are_one_head(tmp_path: Path) -> None:
    made = fused(attending(rank=3, masked=-np.inf, shift=0.5), tmp_path)
    (found,) = multi_heads(made.model)
    assert (found["num_heads"], found["unidirectional"], found["inputs"]) == (1, 0, 6)


def test_what_changes_a_value_is_undone_and_named(tmp_path: Path) -> None:
    """Scores far below the value that masks them: the original looks at what it means to hide."""
    original = attending(masked=-1e4, shift=-2e4)
    made, data, _ = run(original, tmp_path, fusions=True)
    assert data["attention"]["fused"] == data["fusions"]["attention"] == 0
    ((node, reason),) = data["attention"]["left"].items()
    assert node in {n.name for n in original.graph.node}
    assert reason.startswith("its output differs by ")
    assert data["fell_back"] == f"attention at {node}: {reason}"
    assert "MultiHeadAttention" not in {n.op_type for n in made.graph.node}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"axis": 2}, "its Softmax goes along axis 2"),
        ({"scale": -0.5}, "its scores are multiplied by -0.5"),
        ({"masked": -50.0}, "between its products and its Softmax stands a mask or factor of another kind"),
    ],
)
def test_what_is_not_attention_says_why(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    made = fused(attending(**options), tmp_path)
    assert (made.count, list(made.left.values())) == (0, [reason])


def test_weights_that_are_an_output_stay(tmp_path: Path) -> None:
    model = attending()
    softmax = next(n for n in model.graph.node if n.op_type == "Softmax")
    model.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, None))
    assert list(fused(model, tmp_path).left.values()) == ["its weights are an output, or read by a nested graph"]


def test_one_of_several_that_fails_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusion that does not run, one that differs, one that is right: the last stays."""
    model = attending()
    original = list(model.graph.node)
    for copy in ("second", "third"):
        for node in original:
            twin = model.graph.node.add()
            twin.CopyFrom(node)
            twin.name = f"{copy}/{node.name}"
            twin.input[:] = [f"{copy}/{i}" if any(i in n.output for n in original) else i for i in node.input]
            twin.output[:] = [f"{copy}/{o}" for o in node.output]
        model.graph.output.append(helper.make_tensor_value_info(f"{copy}/y", TensorProto.FLOAT, ["batch", 6, 8]))
    real = attention.Emitter.fuse

    def faulty(self: Any, core: Any, *, causal: bool) -> Any:
        fusion = real(self, core, causal=causal)
        (node,) = (n for n in fusion.nodes if n.op_type == "MultiHeadAttention")
        values = {"second": ("scale", 0.36), "third": ("num_heads", 3)}
        for attribute in node.attribute:
            name, value = values.get(core.label.partition("/")[0], ("", 0))
            if attribute.name == name:
                attribute.CopyFrom(helper.make_attribute(name, value))
        return fusion

    monkeypatch.setattr(attention.Emitter, "fuse", faulty)
    made = fused(model, tmp_path)
    assert made.count == 1
    assert {label.partition("/")[0]: reason.partition(" by ")[0][:30] for label, reason in made.undone.items()} == {
        "second": "its output differs",
        "third": "the fused operator does not ru",
    }
    onnx.checker.check_model(made.model)


def test_sizes_are_the_same_where_two_inferences_say_so() -> None:
    b = GraphBuilder(0)
    shape = b.add("Shape", "x")
    size = b.add("Gather", shape, b.constant("one", 1, np.int64), axis=0)
    wanted = b.add("Concat", b.ints(-1), b.add("Unsqueeze", size, b.ints(0)), b.ints(2, 4), axis=0)
    split = b.add("Reshape", "x", wanted)
    b.add("Relu", split, outputs=["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])
    model = b.model([x], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    noted = helper.make_tensor_value_info(split, TensorProto.FLOAT, ["batch", "rows", 2, 4])  # as a simplifier notes it
    model.graph.value_info.append(noted)
    dims, types = inferred(model)
    assert dims[split][1:] == (dims["x"][1], 2, 4)
    assert types[split] == TensorProto.FLOAT
