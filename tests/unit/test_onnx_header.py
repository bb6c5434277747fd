"""The header reader against the onnx library, on real and on damaged models."""

from __future__ import annotations

import io
import random
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from app.errors import AppError
from app.source_models.onnx_header import ExternalTensor, OnnxHeader, read_onnx_header


def varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out += bytes([n & 0x7F | 0x80])
        n >>= 7
    return out + bytes([n])


def field(number: int, length: int) -> bytes:
    """The start of a length-delimited protobuf field."""
    return varint(number << 3 | 2) + varint(length)


class ForwardOnly:
    """What a compressed archive member gives: short reads and no seeking."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def read(self, size: int, /) -> bytes:
        return self._file.read(min(size, 777))

    def seek(self, position: int, /) -> int:
        raise AssertionError("not seekable")

    def seekable(self) -> bool:
        return False


def tensor_input(name: str, dtype: int, shape: list[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


@cache
def cnn() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.normal(size=(8, 3, 3, 3)).astype(np.float32), "w")
    bias = numpy_helper.from_array(np.zeros(8, np.float32), "b")
    nodes = [
        helper.make_node("Conv", ["image", "w", "b"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Relu", ["r"], ["r2"]),
        helper.make_node("Shape", ["r2"], ["size"]),
    ]
    graph = helper.make_graph(
        nodes,
        "cnn",
        [tensor_input("image", TensorProto.FLOAT, ["batch", 3, None, -1])],
        [tensor_input("r2", TensorProto.FLOAT, None), tensor_input("size", TensorProto.INT64, [4])],
        [weights, bias],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        graph, producer_name="pytorch", producer_version="2.13.0", opset_imports=opsets, ir_version=8
    )


@cache
def with_subgraphs() -> onnx.ModelProto:
    """An If with two branches (nested once more), a custom op, functions, old-style initializers among the inputs."""

    def branch(op: str, inner: onnx.GraphProto | None = None) -> onnx.GraphProto:
        constant = helper.make_node("Constant", [], [f"{op}_k"], value=numpy_helper.from_array(np.ones(3, np.float16)))
        nodes = [constant, helper.make_node(op, [f"{op}_k"], [f"{op}_y"])]
        if inner:
            nodes.append(helper.make_node("If", ["flag"], [f"{op}_z"], then_branch=inner, else_branch=branch("Sqrt")))
        return helper.make_graph(nodes, op, [], [tensor_input(f"{op}_y", TensorProto.FLOAT16, [3])])

    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("Neg", branch("Abs")), else_branch=branch("Exp")),
        helper.make_node(
            "Fancy", ["x", "w"], ["z"], domain="my.ops", alpha=[1.0, 2.0], ids=[-1, 3, 1 << 40], note="hi"
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [
            tensor_input("flag", TensorProto.BOOL, []),
            tensor_input("x", TensorProto.BFLOAT16, ["unk__0", "n + 1", None]),
            tensor_input("w", TensorProto.INT8, [2]),
        ],
        [tensor_input("y", TensorProto.FLOAT16, [3]), tensor_input("z", TensorProto.DOUBLE, ["s"])],
        [helper.make_tensor("w", TensorProto.INT8, [2], [1, 2])],
    )
    function = helper.make_function(
        "my.ops", "F", ["a"], ["b"], [helper.make_node("Sin", ["a"], ["b"])], [helper.make_opsetid("", 18)]
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)


@cache
def with_odd_types() -> onnx.ModelProto:
    sequence = helper.make_tensor_sequence_value_info("seq", TensorProto.FLOAT, None)
    mapping = helper.make_value_info("map", helper.make_map_type_proto(TensorProto.INT64, _float_type()))
    optional = helper.make_value_info("opt", helper.make_optional_type_proto(_float_type()))
    sparse = helper.make_sparse_tensor_value_info("sp", TensorProto.FLOAT, [2, 2])
    text = tensor_input("text", TensorProto.STRING, ["n"])
    values = helper.make_tensor("sparse_w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    graph = helper.make_graph([], "odd", [sequence, mapping, optional, sparse, text], [text])
    graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2]))
    return helper.make_model(graph)


def _float_type() -> onnx.TypeProto:
    return helper.make_tensor_type_proto(TensorProto.FLOAT, ["n"])


MODELS = {"cnn": cnn, "subgraphs": with_subgraphs, "odd": with_odd_types}


def read(data: bytes) -> OnnxHeader:
    return read_onnx_header(io.BytesIO(data), len(data))


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_nodes(inner)


def reference_shape(value: onnx.ValueInfoProto) -> list[int | str | None] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else (d.dim_param or None) for d in tensor.shape.dim
    ]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seekable", [True, False])
def test_agrees_with_the_onnx_library(name: str, seekable: bool) -> None:
    model = MODELS[name]()
    data = model.SerializeToString()
    header = read_onnx_header(io.BytesIO(data) if seekable else ForwardOnly(data), len(data))
    assert header.ir_version == model.ir_version
    assert header.opset_imports == {o.domain or "ai.onnx": o.version for o in model.opset_import}
    assert (header.producer_name, header.producer_version) == (model.producer_name, model.producer_version)
    assert header.graph_name == model.graph.name
    assert header.functions == len(model.functions)
    initializers = {i.name for i in model.graph.initializer}
    for ours, theirs in (
        (header.inputs, [i for i in model.graph.input if i.name not in initializers]),
        (header.outputs, list(model.graph.output)),
    ):
        assert [i["name"] for i in ours] == [i.name for i in theirs]
        for info, value in zip(ours, theirs, strict=True):
            if not value.type.HasField("tensor_type"):
                continue
            expected = TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()
            assert info["dtype"] == {"float": "float32", "double": "float64"}.get(expected, expected)
            reference = reference_shape(value)
            if reference is None:
                assert info["shape"] is None
                continue
            assert info["shape"] is not None
            for dim, wanted in zip(info["shape"], reference, strict=True):
                assert dim == wanted or (wanted is None and str(dim).startswith("unk__"))
    nodes = list(all_nodes(model.graph))
    assert header.nodes == len(nodes)
    assert header.ops == Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in nodes)
    assert header.external == []


def test_unknown_dimensions_get_unique_names() -> None:
    shapes = [i["shape"] for i in read(with_subgraphs().SerializeToString()).inputs]
    assert shapes == [[], ["unk__0", "n + 1", "unk__1"]]
    assert read(cnn().SerializeToString()).inputs[0]["shape"] == ["batch", 3, "unk__0", "unk__1"]


def test_types_that_are_no_tensors() -> None:
    dtypes = {i["name"]: i["dtype"] for i in read(with_odd_types().SerializeToString()).inputs}
    assert dtypes == {"seq": "sequence", "map": "map", "opt": "optional", "sp": "sparse_tensor", "text": "string"}


def test_every_dtype_of_onnx_has_its_name() -> None:
    for name, number in TensorProto.DataType.items():
        model = helper.make_model(helper.make_graph([], "g", [tensor_input("x", number, [1])], []))
        expected = {"float": "float32", "double": "float64"}.get(name.lower(), name.lower())
        assert read(model.SerializeToString()).inputs[0]["dtype"] == expected


def test_parameters_are_counted() -> None:
    assert read(cnn().SerializeToString()).parameters == 8 * 3 * 3 * 3 + 8


def external(
    name: str, *, dims: tuple[int, ...] = (4, 2), dtype: int = TensorProto.FLOAT, **entries: str
) -> TensorProto:
    tensor = TensorProto(name=name, dims=dims, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def test_external_data_everywhere() -> None:
    inner = helper.make_graph([], "inner", [], [], [external("in_subgraph", location="a", offset="8", length="32")])
    sparse = helper.make_sparse_tensor(
        external("sparse_values", dims=(3,), location="s"),
        helper.make_tensor("i", TensorProto.INT64, [3], [0, 1, 2]),
        [9],
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["k"], value=external("in_attribute", dtype=TensorProto.INT4, location="b")),
    ]
    graph = helper.make_graph(
        nodes, "g", [tensor_input("c", TensorProto.BOOL, [])], [], [external("w", location="d/e")]
    )
    graph.sparse_initializer.append(sparse)
    function_node = helper.make_node("Constant", [], ["b"], value=external("in_function", location="f", length="1"))
    function = helper.make_function("f", "F", [], ["b"], [function_node], [helper.make_opsetid("", 18)])
    header = read(helper.make_model(graph, functions=[function]).SerializeToString())
    assert sorted(header.external, key=lambda t: t.tensor) == [
        ExternalTensor("in_attribute", "b", 0, 4),
        ExternalTensor("in_function", "f", 0, 1),
        ExternalTensor("in_subgraph", "a", 8, 32),
        ExternalTensor("in_subgraph", "a", 8, 32),
        ExternalTensor("sparse_values", "s", 0, 12),
        ExternalTensor("w", "d/e", 0, 32),
    ]


@pytest.mark.parametrize(
    "entries", [{"location": "x", "offset": "-1"}, {"location": "x", "length": "ten"}, {"offset": "1"}]
)
def test_senseless_external_data(entries: dict[str, str]) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [external("w", **entries)]))
    with pytest.raises(AppError, match="'w'") as caught:
        read(model.SerializeToString())
    assert (caught.value.code, caught.value.tensor) == ("invalid_model", "w")


def test_a_gigabyte_of_weights_is_skipped(tmp_path: Path) -> None:
    """A sparse file: 1 GiB of raw_data between the header and the rest of the graph."""
    size = 1 << 30

    small = cnn().SerializeToString()
    tensor_head = b"\x08" + varint(size // 4) + b"\x10\x01" + field(8, 3) + b"big" + field(9, size)
    initializer = field(5, len(tensor_head) + size) + tensor_head
    path = tmp_path / "big.onnx"
    with path.open("wb") as f:
        f.write(field(7, len(initializer) + size) + initializer)
        f.seek(size, io.SEEK_CUR)
        # More fields of the same message types are merged, as protobuf has it.
        f.write(small)
    started = time.monotonic()
    tracemalloc.start()
    with path.open("rb") as f:
        header = read_onnx_header(f, path.stat().st_size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert header.parameters == size // 4 + 224
    assert [i["name"] for i in header.inputs] == ["image"]
    assert peak < 1 << 20
    assert time.monotonic() - started < 2


def test_millions_of_attribute_numbers_are_fast() -> None:
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml")
    node.attribute.add(name="ids", type=onnx.AttributeProto.INTS).ints.extend([-1, 5, 1 << 40] * 500_000)
    node.attribute.add(name="values", type=onnx.AttributeProto.FLOATS).floats.extend([0.5] * 500_000)
    model = helper.make_model(helper.make_graph([node], "g", [tensor_input("x", 1, ["n", 2])], []))
    data = model.SerializeToString()
    started = time.monotonic()
    assert read(data).ops == {"ai.onnx.ml.TreeEnsembleRegressor": 1}
    assert time.monotonic() - started < 2


def test_every_truncation_is_refused_and_says_where() -> None:
    data = cnn().SerializeToString()
    opset_start = data.rindex(b"\x42")  # the last field of the model
    survived: list[int] = []
    for cut in range(len(data) - 1):
        error: AppError | None = None
        try:
            header = read(data[:cut])
        except AppError as e:
            error = e
        if error:
            assert error.code == "invalid_model"
            assert error.remedy
            assert any(why in error.detail for why in ("truncated at byte", "no graph", "no IR version"))
        else:
            assert len(header.opset_imports) < 2
            survived.append(cut)
    # Cut exactly between two fields after the graph: an operator set is missing, which the caller checks.
    assert len(survived) == 2
    assert max(survived) == opset_start


def test_bounds_on_nesting_names_and_rank() -> None:
    # protobuf's own writer refuses such nesting: graph > node > attribute > graph, by hand
    nested = b""
    for number in [6, 5, 1] * 40:
        nested = field(number, len(nested)) + nested
    with pytest.raises(AppError, match="nested"):
        read(b"\x08\x08" + field(7, len(nested)) + nested)
    for model, reason in (
        (helper.make_model(helper.make_graph([], "n" * 5000, [], [])), "longer than"),
        (helper.make_model(helper.make_graph([], "g", [tensor_input("x", 1, [1] * 100)], [])), "dimensions"),
        (helper.make_model(helper.make_graph([], "g", [], [], [TensorProto(dims=[1] * 100)])), "dimensions"),
        (helper.make_model(helper.make_graph([], "g", [], [], [TensorProto(dims=[1 << 40] * 4)])), "impossible"),
    ):
        with pytest.raises(AppError, match=reason) as caught:
            read(model.SerializeToString())
        assert caught.value.code == "invalid_model"


def test_names_cannot_fill_the_memory() -> None:
    graph = helper.make_graph([], "g", [], [])
    for i in range(20_000):
        graph.initializer.add(name=f"{i:04000}")
    data = helper.make_model(graph).SerializeToString()
    tracemalloc.start()
    with pytest.raises(AppError, match="names and shapes"):
        read(data)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, 2**32), changes=st.integers(1, 20), forward=st.booleans()
)
def test_mutations_give_a_result_or_invalid_model(name: str, seed: int, changes: int, forward: bool) -> None:
    rng = random.Random(seed)
    data = bytearray(MODELS[name]().SerializeToString())
    for _ in range(changes):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(1, 20)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case _:
                data[at:at] = data[(start := rng.randrange(len(data))) : start + 50]
        if not data:
            return
    outcome(bytes(data), forward=forward)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=2000), forward=st.booleans())
def test_garbage_gives_a_result_or_invalid_model(data: bytes, forward: bool) -> None:
    outcome(data, forward=forward)


def outcome(data: bytes, *, forward: bool) -> None:
    code = "invalid_model"
    try:
        header = read_onnx_header(ForwardOnly(data) if forward else io.BytesIO(data), len(data))
        assert header.ir_version
    except AppError as e:
        code = e.code
    assert code == "invalid_model"


BAD = ["\0", "\n", "\x1b", "\x7f"]


@pytest.mark.parametrize("bad", BAD)
def test_control_characters_in_names_are_refused(bad: str) -> None:
    name = f"a{bad}b"

    def model(
        *, x: str = "x", dim: str = "n", op: str = "Relu", domain: str = "", node: str = "", weight: str = "w"
    ) -> onnx.ModelProto:
        inner = helper.make_graph([helper.make_node(op, ["x"], ["z"], domain=domain, name=node)], "g", [], [])
        graph = helper.make_graph(
            [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
            "g",
            [tensor_input(x, TensorProto.FLOAT, [dim])],
            [tensor_input("y", TensorProto.FLOAT, [1])],
            [numpy_helper.from_array(np.ones(1, np.float32), weight)],
        )
        return helper.make_model(graph)

    read(model().SerializeToString())
    fields = {
        "x": "an input or output", "dim": "a dimension", "op": "an op type", "domain": "the domain of an op",
        "node": "a node", "weight": "a tensor",
    }  # fmt: skip
    for where, what in fields.items():
        with pytest.raises(AppError) as caught:
            read(model(**{where: name}).SerializeToString())
        assert caught.value.code == "invalid_model"
        assert f"The name of {what}, " in caught.value.detail
        assert f"U+{ord(bad):04X}: {name!r}" in caught.value.detail
        assert caught.value.tensor == "a\ufffdb"
    imports = model()
    imports.opset_import.add(domain=name, version=1)
    with pytest.raises(AppError, match="an operator-set domain"):
        read(imports.SerializeToString())


def test_what_nothing_refers_to_may_hold_any_text() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(cnn())
    model.producer_name, model.producer_version, model.graph.name = "a\0", "1\n", "g\x1b\u00e9"
    header = read(model.SerializeToString())
    assert (header.producer_name, header.producer_version) == ("a\ufffd", "1\ufffd")
    assert header.graph_name == "g\ufffd\u00e9"
