"""Model repositories in a real tritonserver: they load, what comes back is the engine's answer, and batches form."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper

from tests.factories import onnx_models as models
from tests.factories.bundled import Made, bundled, chained, packaged
from tests.factories.chains import encoder, engines, head, pixels
from tests.integrations.environments import environment
from tests.integrations.tritonserver import tritonserver
from tests.unit.test_by_batch import apart, side_by_side
from workers.kernel import backends
from workers.serving.triton_server import CALLS, Example, NotLoaded, Server, replayed, running
from workers.serving.v2_client import Connection, Refused

READY_S = 60.0
SETTINGS = {
    "instances": 2,
    "threads": 1,
    "max_batch": 8,
    "max_delay_ms": 5.0,
    "preferred_batches": [4],
    "queue_limit": 100,
}
ALONE = {"instances": 1, "threads": 1, "max_batch": 4, "max_delay_ms": 0.0}
TUNED = {"serving": {"settings": SETTINGS}}
# Triton's own protobuf, which has no mercy on a field that it does not know.
PARSE = """
import json, sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
config = text_format.Parse(open(sys.argv[1]).read(), model_config_pb2.ModelConfig())
print(json.dumps(json_format.MessageToDict(config, preserving_proto_field_name=True)))
"""


@pytest.fixture(scope="module")
def server() -> Path:
    return tritonserver()


def config_of(repository: Path, model: str = "m-fp32") -> dict[str, Any]:
    command = [environment("triton") / "bin" / "python", "-c", PARSE, repository / model / "config.pbtxt"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@contextmanager
def served(script: Path, made: Made, folder: Path) -> Iterator[tuple[Server, dict[str, Any]]]:
    """The server, and the repository's configuration as it reads it."""
    repository = made.unpacked("triton", folder / "models")
    config = config_of(repository)
    with running(script, repository, folder, READY_S) as found:
        yield found, config


def example(made: Made, *, batched: bool = True) -> Example:
    sample, expected = made.arrays("sample_input.npz"), made.arrays("expected_output.npz")
    return Example("m-fp32", sample, expected, batched, "fp32")


@pytest.mark.parametrize(
    ("backend", "isa", "native"),
    [("onnxruntime", (), True), ("openvino", (), True), ("openvino", ("avx512_bf16",), False)],
    ids=["onnxruntime", "openvino", "python"],
)
def test_a_repository_answers_as_the_engine_does_and_batches(
    server: Path, backend: str, isa: tuple[str, ...], native: bool, tmp_path: Path
) -> None:
    made = bundled(backend, models.mlp(hidden=256), tmp_path, isa=isa, deployment=TUNED)
    with served(server, made, tmp_path) as (found, config):
        told = replayed(found, example(made))
        assert config["backend"] == (backend if native else "python")
        assert config["max_batch_size"] == 8
        assert (config["input"][0]["dims"], config["output"][0]["dims"]) == (["8"], ["4"])
        assert config["instance_group"] == [{"count": 2, "kind": "KIND_CPU"}]
        assert config["dynamic_batching"] == {
            "preferred_batch_size": [4],
            "max_queue_delay_microseconds": "5000",
            "default_queue_policy": {"max_queue_size": 100},
        }
        assert [(w["name"], w["batch_size"]) for w in config["model_warmup"]] == [
            ("batch 1", 1),
            ("batch 4", 4),
            ("batch 8", 8),
        ]
        threads = {"onnxruntime": ("intra_op_thread_count", "1"), "openvino": ("INFERENCE_NUM_THREADS", "2")}
        if native:
            name, value = threads[backend]
            assert config["parameters"][name] == {"string_value": value}
        # Eight callers at once, and a batch waits for others: fewer executions than requests.
        assert told["requests"] == CALLS
        assert told["executions"] < CALLS
        assert told["largest_difference"] < 1e-5
        other = example(made)
        other = replace(other, expected={name: array + 1 for name, array in other.expected.items()})
        with pytest.raises(NotLoaded, match="its answers differ by"):
            replayed(found, other)
        # A client's own batch, other rows in every request.
        rows = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
        connection = Connection(found.http_port, "m-fp32", 10.0)
        whole = connection.infer({"input": rows}, ["logits"], batched=True)["logits"]
        single = [connection.infer({"input": row[None]}, ["logits"], batched=True)["logits"] for row in rows]
        np.testing.assert_allclose(whole, np.concatenate(single), rtol=1e-4, atol=1e-5)
        with pytest.raises(Refused, match="batch-size must be <= 8"):
            connection.infer({"input": np.zeros((9, 8), np.float32)}, ["logits"], batched=True)
        connection.close()


def test_classes_have_their_names(server: Path, tmp_path: Path) -> None:
    labels = ["ant", "bee", "cat", "a dog"]
    made = bundled("onnxruntime", models.mlp(), tmp_path, deployment=TUNED, labels=labels)
    with served(server, made, tmp_path) as (found, config):
        assert config["output"][0]["label_filename"] == "labels.txt"
        data = [float(x) for x in made.arrays("sample_input.npz")["input"].ravel()]
        asked = {
            "inputs": [{"name": "input", "shape": [1, 8], "datatype": "FP32", "data": data}],
            "outputs": [{"name": "logits", "parameters": {"classification": 1}}],
        }
        url = f"http://127.0.0.1:{found.http_port}/v2/models/m-fp32/infer"
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(asked).encode())) as answer:
            (told,) = json.load(answer)["outputs"][0]["data"]
    best = int(made.arrays("expected_output.npz")["logits"].argmax())
    assert told.split(":")[1:] == [str(best), labels[best]]


def _number_for_each_sample() -> ModelProto:
    nodes = [helper.make_node("ReduceMax", ["x"], ["y"], axes=[1], keepdims=0), helper.make_node("Neg", ["n"], ["m"])]
    values = models.value("x", ["batch", 4]), models.value("n", ["batch"], TensorProto.INT64)
    outputs = models.value("y", ["batch"]), models.value("m", ["batch"], TensorProto.INT64)
    return models.make_model(nodes, list(values), list(outputs), [])


def _state_first() -> ModelProto:
    nodes = [helper.make_node("Add", ["x", "state"], ["next"])]
    x, state = models.value("x", ["batch", 4]), models.value("state", [2, "batch", 4])
    return models.make_model(nodes, [x, state], [models.value("next", [2, "batch", 4])], [])


def _number_for_all() -> ModelProto:
    nodes = [helper.make_node("Mul", ["x", "factor"], ["y"])]
    x, factor = models.value("x", ["batch", 4]), models.value("factor", [])
    return models.make_model(nodes, [x, factor], [models.value("y", ["batch", 4])], [])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(
    ("model", "batch", "dims"),
    [
        (_number_for_each_sample(), 8, [["4"], ["1"]]),
        (_state_first(), 0, [["-1", "4"], ["2", "-1", "4"]]),
        (_number_for_all(), 0, [["-1", "4"], ["1"]]),
        (models.mlp(batch=3), 0, [["3", "8"]]),
        (models.embedding(), 8, [["-1"]]),
    ],
    ids=["numbers", "state", "number", "fixed", "sequence"],
)
def test_other_shapes(
    server: Path, backend: str, model: ModelProto, batch: int, dims: list[list[str]], tmp_path: Path
) -> None:
    made = bundled(backend, model, tmp_path, isa=("avx512_bf16",), deployment=TUNED)
    with served(server, made, tmp_path) as (found, config):
        replayed(found, example(made, batched=batch > 0))
        assert config.get("max_batch_size", 0) == batch
        assert [tensor["dims"] for tensor in config["input"]] == dims
        assert ("dynamic_batching" in config) == (batch > 0)
        assert all(w["batch_size"] == 1 for w in config["model_warmup"]) == (batch == 0)


def test_a_request_that_fails_spoils_no_other_of_its_batch(server: Path, tmp_path: Path) -> None:
    """An id outside of the table, which the Python backend meets in the middle of a batch."""
    made = bundled("onnxruntime", models.embedding(), tmp_path, runtime={"denormal_as_zero": True}, deployment=TUNED)
    with served(server, made, tmp_path) as (found, config):
        assert config["backend"] == "python"

        def ask(token: int) -> Any:
            connection = Connection(found.http_port, "m-fp32", 10.0)
            try:
                (name,) = made.arrays("sample_input.npz")
                (output,) = made.arrays("expected_output.npz")
                return connection.infer({name: np.full((1, 3), token, np.int64)}, [output], batched=True)[output]
            except Refused as refused:
                return str(refused)
            finally:
                connection.close()

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [0, 1, 999, 2, 3, 4, 999, 0] * 4))
        for index, answer in enumerate(answers):
            assert isinstance(answer, str) == (index % 8 in (2, 6)), answer
        assert "indices element out of data bounds" in answers[2]


def test_two_engines_in_one_bundle_are_one_model(server: Path, tmp_path: Path) -> None:
    """Each request goes to the engine for the size of the batch that Triton made of it."""
    engine, runtime = side_by_side(tmp_path, apart(), most=1)
    made = packaged(
        "by-batch", engine, runtime, tmp_path, isa=("avx512_bf16",), deployment={"serving": {"settings": ALONE}}
    )
    with served(server, made, tmp_path) as (found, config):
        assert config["backend"] == "python"
        connection = Connection(found.http_port, "m-fp32", 10.0)
        for rows, name in ((1, "small"), (4, "large")):
            member = next(e for e in runtime["engines"] if e["folder"] == name)
            session = backends()[member["backend"]]().load(engine / name, member["runtime"])
            feeds = {"input": np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)}
            answer = connection.infer(feeds, ["logits"], batched=True)["logits"]
            np.testing.assert_allclose(answer, session.run(feeds)["logits"], rtol=1e-4, atol=1e-5)
            session.close()
        connection.close()


def _scaled_by(name: str) -> ModelProto:
    """What the network above gives, scaled: of one more input, and with an output called as the ensemble's input."""
    nodes = [helper.make_node("Mul", [name, "factor"], ["scaled"]), helper.make_node("Neg", [name], ["input"])]
    inputs = [models.value(name, ["batch", 4]), models.value("factor", ["batch", 1])]
    outputs = [models.value("scaled", ["batch", 4]), models.value("input", ["batch", 4])]
    return models.make_model(nodes, inputs, outputs, [])


@pytest.mark.parametrize(("taken", "connect"), [("logits", []), ("scores", ["logits:scores"])], ids=["names", "told"])
def test_two_engines_are_one_ensemble(server: Path, taken: str, connect: list[str], tmp_path: Path) -> None:
    first = bundled("onnxruntime", models.mlp(), tmp_path / "a", deployment=TUNED, name="net")
    second = bundled("openvino", _scaled_by(taken), tmp_path / "b", deployment=TUNED, name="scale")
    repository = tmp_path / "models"
    name = chained(first, second, repository, connect)
    assert name == "net-then-scale"
    config = config_of(repository, name)
    assert (config["platform"], config["max_batch_size"]) == ("ensemble", 8)
    assert [t["name"] for t in config["input"]] == ["input", "factor"]
    assert [t["name"] for t in config["output"]] == ["scaled", "input_out"]
    generator = np.random.default_rng(2)
    feeds = {"input": generator.normal(size=(3, 8)), "factor": generator.normal(size=(3, 1))}
    feeds = {key: array.astype(np.float32) for key, array in feeds.items()}
    with running(server, repository, tmp_path, READY_S) as found:
        connection = Connection(found.http_port, "net", 10.0)
        between = connection.infer({"input": feeds["input"]}, ["logits"], batched=True)["logits"]
        connection.close()
        connection = Connection(found.http_port, name, 10.0)
        answer = connection.infer(feeds, ["scaled", "input_out"], batched=True)
        connection.close()
        assert found.metrics("scale")["nv_inference_request_success"] > 0
    np.testing.assert_allclose(answer["scaled"], between * feeds["factor"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answer["input_out"], -between, rtol=1e-4, atol=1e-5)


def test_engines_that_are_served_one_by_one_are_chained_too(server: Path, tmp_path: Path) -> None:
    first = bundled("onnxruntime", models.mlp(batch=3), tmp_path / "a", deployment=TUNED, name="net")
    second = bundled("onnxruntime", _negated(3), tmp_path / "b", deployment=TUNED, name="neg")
    name = chained(first, second, tmp_path / "models")
    feeds = first.arrays("sample_input.npz")
    with running(server, tmp_path / "models", tmp_path, READY_S) as found:
        connection = Connection(found.http_port, name, 10.0)
        answer = connection.infer(feeds, ["y"], batched=False)["y"]
        connection.close()
    np.testing.assert_allclose(answer, -first.arrays("expected_output.npz")["logits"], rtol=1e-4, atol=1e-5)


def _negated(batch: int) -> ModelProto:
    nodes = [helper.make_node("Neg", ["x"], ["y"])]
    return models.make_model(nodes, [models.value("x", [batch, 4])], [models.value("y", [batch, 4])], [])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_chain_with_an_engine_of_each_model_is_one_ensemble(server: Path, backend: str, tmp_path: Path) -> None:
    """As a job ships it: the stage tries it in the server by itself, and each model answers by itself, too."""
    parts = [pixels(), encoder(), head()]
    engine, runtime = engines(backend, parts, tmp_path)
    made = packaged(
        "chained", engine, runtime, tmp_path, tritonserver=server, name="m-fp32", isa=("avx512_bf16",), deployment=TUNED
    )
    tried = made.data["kinds"]["triton"]["tried"]
    assert (tried["requests"], tried["largest_difference"] < 1e-5) == (CALLS, True)
    sample, expected = made.arrays("sample_input.npz"), made.arrays("expected_output.npz")
    with served(server, made, tmp_path) as (found, config):
        assert (config["platform"], config["max_batch_size"]) == ("ensemble", 8)
        assert [t["name"] for t in config["input"]] == ["pixels", "weight"]
        assert [s["model_name"] for s in config["ensemble_scheduling"]["step"]] == ["m-fp32-1", "m-fp32-2", "m-fp32-3"]
        known = dict(sample)
        for place, (takes, gives) in enumerate((("pixels", "input"), ("input", "embedding")), 1):
            connection = Connection(found.http_port, f"m-fp32-{place}", 10.0)
            known |= connection.infer({takes: known[takes]}, [gives], batched=True)
            connection.close()
        connection = Connection(found.http_port, "m-fp32-3", 10.0)
        last = connection.infer({n: known[n] for n in ("embedding", "weight")}, ["logits"], batched=True)
        connection.close()
        np.testing.assert_allclose(last["logits"], expected["logits"], rtol=1e-4, atol=1e-5)
        # Eight callers at once: the models batch by themselves.
        replayed(found, Example("m-fp32", sample, expected, True, "fp32"))
        counted = found.metrics("m-fp32-2")
        assert counted["nv_inference_exec_count"] < counted["nv_inference_request_success"]
        rows = {
            "pixels": np.random.default_rng(4).integers(0, 256, size=(5, 8)).astype(np.uint8),
            "weight": np.ones((5, 1), np.float32),
        }
        connection = Connection(found.http_port, "m-fp32", 10.0)
        whole = connection.infer(rows, ["logits"], batched=True)["logits"]
        connection.close()
    session = backends()["chained"]().load(engine, runtime)
    np.testing.assert_allclose(whole, session.run(rows)["logits"], rtol=1e-4, atol=1e-5)
    session.close()


def test_a_chain_between_whose_models_the_batch_is_lost_is_served_one_by_one(server: Path, tmp_path: Path) -> None:
    """All samples of a call together between the two: no server may put further ones beside them."""
    nodes = [helper.make_node("Transpose", ["input"], ["turned"], perm=[1, 0])]
    first = models.make_model(nodes, [models.value("input", ["batch", 4])], [models.value("turned", [4, "batch"])], [])
    nodes = [helper.make_node("Transpose", ["turned"], ["back"], perm=[1, 0]), helper.make_node("Neg", ["back"], ["y"])]
    second = models.make_model(nodes, [models.value("turned", [4, "n"])], [models.value("y", ["n", 4])], [])
    engine, runtime = engines("onnxruntime", [first, second], tmp_path)
    made = packaged("chained", engine, runtime, tmp_path, tritonserver=server, deployment=TUNED)
    assert made.data["kinds"]["triton"]["tried"]["largest_difference"] == 0.0
    assert "max_batch_size: 0" in (made.unpacked("triton", tmp_path / "models") / "m-fp32/config.pbtxt").read_text()


def test_the_stage_tries_the_repository_where_there_is_a_server(server: Path, tmp_path: Path) -> None:
    made = bundled("onnxruntime", models.mlp(), tmp_path / "a", deployment=TUNED, tritonserver=server)
    tried = made.data["kinds"]["triton"]["tried"]
    assert (tried["requests"], tried["largest_difference"] < 1e-5) == (CALLS, True)
    assert made.unpacked("triton", tmp_path / "models")
    # A server that cannot load it: no such kind, and why.
    broken = tmp_path / "tritonserver"
    broken.write_text(f'#!/bin/sh\nrm -f models/m-fp32/1/*\nexec {server} "$@"\n')
    broken.chmod(0o755)
    made = bundled("onnxruntime", models.mlp(), tmp_path / "b", deployment=TUNED, tritonserver=broken)
    reason = made.data["kinds"]["triton"]["reason"]
    assert reason.startswith("In tritonserver of this worker it ended with 1: "), reason
    absent = bundled("onnxruntime", models.mlp(), tmp_path / "c", tritonserver=tmp_path / "nothing")
    assert "nothing of this worker nothing cannot be started" in absent.data["kinds"]["triton"]["reason"]
