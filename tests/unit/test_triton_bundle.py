"""What a model repository of Triton says of an engine; `tests/integrations` loads such ones in a real server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.artifacts.protobuf_text import Word, text_format
from tests.factories import onnx_models as models
from tests.factories.bundled import bundled
from workers.graph.labels import labels_of
from workers.kernel import TensorSpec, backends
from workers.rounding import tolerance
from workers.serving.native import Instances, InTriton
from workers.serving.triton import NotServable, Served, max_batch, repository

ENGINE = {
    "format": "anneal-tensorrt-plan/1",
    "tensorrt": "11.1.0",
    "gpu": {"name": "NVIDIA H100"},
    "profiles": [
        {"x": {"min": [1, 8], "opt": [1, 8], "max": [1, 8]}},
        {"x": {"min": [1, 8], "opt": [8, 8], "max": [16, 8]}},
    ],
}


def served(native: InTriton, **changes: Any) -> Served:
    given: dict[str, Any] = {
        "name": "m-fp32",
        "machine": "a machine",
        "inputs": [TensorSpec("x", "float32", ("batch", 8))],
        "outputs": [TensorSpec("y", "float32", ("batch", 4))],
        "sample": {"x": np.zeros((1, 8), np.float32)},
        "batched": True,
        "serving": {"instances": 1, "max_batch": 32, "max_delay_ms": 2.0, "preferred_batches": [4, 64]},
        "group": "KIND_GPU",
        "native": native,
        "versions": {"numpy": "2.1"},
        "script": {"infer.py": "infer.py"},
    }
    return Served(**{**given, **changes})


def asked(name: str, engine: Path, runtime: dict[str, Any], *isa: str, count: int = 1) -> InTriton:
    return backends()[name]().in_triton(Instances(engine, runtime, count, {"isa": isa}))


def config(made: Served) -> str:
    return repository(made).texts["triton/config.pbtxt"].decode()


def test_a_plan_for_tensorrt(tmp_path: Path) -> None:
    """By its sidecar: profiles, CUDA graphs, and no batch that no profile holds."""
    (tmp_path / "engine.json").write_text(json.dumps(ENGINE))
    native = asked("tensorrt", tmp_path, {"cuda_graph": True})
    made = served(native)
    text = config(made)
    assert max_batch(made) == 16
    assert repository(made).files["m-fp32/1/model.plan"] == "engine.plan"
    for words in (
        'backend: "tensorrt"',
        "max_batch_size: 16",
        'profile: ["0", "1"]',
        "kind: KIND_GPU",
        "graphs: true",
        "preferred_batch_size: [4]\n  max_queue_delay_microseconds: 2000",
        "TensorRT 11.1.0, which the server's image must have, on NVIDIA H100",
    ):
        assert words in text
    converted = asked("tensorrt", tmp_path, {"declared": {"y": "float64"}})
    assert converted.backend == "python"
    assert "types differ between the model and the plan (y)" in str(converted.why)
    assert asked("tensorrt-rtx", tmp_path, {}).backend == "python"


def test_the_cuda_provider_s_options_are_passed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    native = asked(
        "onnxruntime-cuda", tmp_path, {"tf32": False, "cuda_graph": True, "graph_optimization_level": "basic"}
    )
    text = config(served(native))
    for words in ('name: "cuda"', 'key: "use_tf32"\n        value: "0"', "level: -1", "captures no CUDA graph"):
        assert words in text
    assert asked("onnxruntime-cuda", tmp_path, {"session_config": {"a": "1"}}).backend == "python"


@pytest.mark.parametrize(
    ("runtime", "isa", "why"),
    [
        ({"inference_precision": "f32"}, (), None),
        ({"inference_precision": "f32"}, ("avx512_bf16",), "would compute in bf16 on this processor"),
        ({"inference_precision": "bf16"}, ("avx512_bf16",), None),
        ({"inference_precision": "f32", "snippets": False}, (), "cannot switch off the fused kernels"),
    ],
)
def test_openvino_where_triton_computes_the_same(
    tmp_path: Path, runtime: dict[str, Any], isa: tuple[str, ...], why: str | None
) -> None:
    made = bundled("openvino", models.mlp(), tmp_path)
    engine = tmp_path / "engine"
    native = asked("openvino", engine, {**runtime, "num_streams": 1, "inference_num_threads": 2}, *isa, count=3)
    assert (native.backend == "openvino") == (why is None)
    assert (why or "") in str(native.why)
    if why is None:  # one compiled model for all instances of a server: a stream each
        assert (native.parameters["NUM_STREAMS"], native.parameters["INFERENCE_NUM_THREADS"]) == ("3", "6")
        assert native.parameters.get("HINT_BF16") == ("YES" if runtime["inference_precision"] == "bf16" else None)
    assert made.data["kinds"]["triton"]["backend"] == "openvino"


def test_names_that_openvino_lost_are_asked_for_by_the_script(tmp_path: Path) -> None:
    bundled("openvino", models.mlp(), tmp_path)
    graph = tmp_path / "engine/model.xml"
    graph.write_text(graph.read_text().replace('names="input"', ""))
    assert "do not hold the name 'input'" in str(asked("openvino", tmp_path / "engine", {}).why)


def test_an_engine_that_triton_has_no_backend_for_runs_as_a_script(tmp_path: Path) -> None:
    native = asked("inductor", tmp_path, {})
    made = repository(served(native, script={"infer.py": "triton/infer.py", "model.pt2": "model.pt2"}))
    assert made.files["m-fp32/1/infer.py"] == "triton/infer.py"
    assert made.files["m-fp32/1/model.pt2"] == "model.pt2"
    assert "Triton has no backend for inductor engines" in made.notes[0]


def test_sizes_that_were_judged_bound_the_batch_and_the_dims() -> None:
    native = InTriton(backend="onnxruntime", files={"model.onnx": "model.onnx"})
    wide = [TensorSpec("x", "float32", ("batch", "length", "width"))]
    sample = {"x": np.zeros((1, 3, 5), np.float32)}
    made = served(native, inputs=wide, sample=sample, accepts={"x": [[1, 6], [2, 9], [5, 5]]})
    text = config(made)
    assert "max_batch_size: 6" in text
    assert "dims: [-1, 5]" in text
    assert "dims: [3, 5]" in text, "of the sample, to warm up with"
    assert "it was judged at 'x' on axis 1: 2 to 9" in text


def test_what_triton_has_no_type_for() -> None:
    native = InTriton(backend="onnxruntime")
    for dtype in ("string", "float8_e4m3fn"):
        with pytest.raises(NotServable, match=f"no type for 'x', which is {dtype}"):
            repository(served(native, inputs=[TensorSpec("x", dtype, ("batch", 8))]))
    with pytest.raises(NotServable, match="bfloat16"):
        repository(served(InTriton(why="so"), outputs=[TensorSpec("y", "bfloat16", ("batch", 8))]))


def test_the_text_format_quotes_what_a_name_may_hold() -> None:
    message = {
        "name": 'a"b\\c\nd',
        "kind": Word("KIND_CPU"),
        "empty": {"shape": []},
        "flag": True,
        "two": [{"n": 1}, {"n": 2}],
    }
    assert list(text_format(message)) == [
        'name: "a\\"b\\\\c\\012d"',
        "kind: KIND_CPU",
        "empty {",
        "}",
        "flag: true",
        "two {",
        "  n: 1",
        "}",
        "two {",
        "  n: 2",
        "}",
    ]


def test_the_sizes_that_formed_under_the_traffic_are_warmed_up() -> None:
    text = config(served(InTriton("openvino"), formed=[2, 3, 5, 99]))
    for size in (1, 2, 3, 4, 5, 32):
        assert f'name: "batch {size}"' in text
    assert text.count("model_warmup {") == 6


def test_many_preferred_sizes_warm_up_with_the_ends() -> None:
    serving = {"instances": 1, "max_batch": 40, "max_delay_ms": 0, "preferred_batches": list(range(2, 40, 2))}
    text = config(served(InTriton(backend="onnxruntime"), serving=serving))
    assert text.count("model_warmup {") == 8
    assert 'name: "batch 1"' in text
    assert 'name: "batch 40"' in text


@pytest.mark.parametrize(
    ("key", "text", "labels"),
    [
        ("names", "{0: 'a cat', 1: 'dog'}", ["a cat", "dog"]),
        ("id2label", '{"1": "dog", "0": "cat"}', ["cat", "dog"]),
        ("labels", '["cat", "dog\\nhouse"]', ["cat", "dog house"]),
        ("classes", "['cat', 'dog']", ["cat", "dog"]),
        ("names", "{0: 'cat', 2: 'dog'}", None),
        ("names", "{0: 'cat', 1: 2}", None),
        ("names", "cat, dog", None),
        ("names", "(" * 10_000, None),
        ("names", "__import__('os')", None),
        ("author", '["cat"]', None),
    ],
)
def test_names_of_classes_are_read_from_the_model(key: str, text: str, labels: list[str] | None) -> None:
    model = models.mlp()
    model.metadata_props.add(key=key, value=text)
    assert labels_of(model) == labels


def test_only_an_output_of_as_many_numbers_has_the_names() -> None:
    native = InTriton(backend="onnxruntime")
    outputs = [
        TensorSpec("scores", "float32", ("batch", 2)),
        TensorSpec("boxes", "float32", ("batch", 4)),
        TensorSpec("ids", "int64", ("batch", 2)),
    ]
    made = repository(served(native, outputs=outputs, labels=["cat", "dog"]))
    assert made.texts["triton/labels.txt"] == b"cat\ndog\n"
    assert made.files["m-fp32/labels.txt"] == "triton/labels.txt"
    assert made.texts["triton/config.pbtxt"].decode().count("label_filename") == 1
    assert "triton/labels.txt" not in repository(served(native, outputs=outputs)).texts


def test_why_nothing_is_batched_is_what_was_found_out() -> None:
    native = InTriton(backend="onnxruntime")
    alone = {"instances": 1, "max_batch": 1, "reason": "requests are served one by one: outputs depend on the batch"}
    for serving, words in (
        (alone, "Requests are served one by one: outputs depend on the batch (max_batch_size 0)."),
        ({"instances": 1, "max_batch": 1}, "The batch is not the first axis of every input and output, or is fixed"),
    ):
        made = repository(served(native, batched=False, serving=serving))
        assert made.notes[0].startswith(words)
        assert "max_batch_size: 0" in made.texts["triton/config.pbtxt"].decode()
    padded = {"instances": 1, "max_batch": 4, "pad": {"x": {1: [16]}}}
    assert any("Triton does not pad" in note for note in repository(served(native, serving=padded)).notes)


def test_several_engines_are_held_to_the_lowest_precision() -> None:
    assert [tolerance(p) for p in ("fp32", "int8+fp32", "fp32+bf16", "other")] == [1e-3, 5e-2, 5e-2, 1e-3]
