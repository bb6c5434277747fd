"""Whether TensorRT takes a model, told by its real parser and builder on a machine without a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import helper

from app.domain.failures import StageFailure
from tests.factories import architectures
from tests.factories import onnx_models as models
from tests.factories.examining import examined, fuzzed
from tests.factories.mutations import mutated
from tests.factories.tensorrt_rtx import Recorder
from workers.backends.tensorrt import admits
from workers.backends.tensorrt.library import RTX
from workers.pipeline.isolated import IsolatedRunner


@pytest.fixture(scope="module")
def isolated() -> Iterator[IsolatedRunner]:
    runner = IsolatedRunner()
    runner.start()
    yield runner
    runner.close()


def test_a_model_that_it_takes(isolated: IsolatedRunner, tmp_path: Path) -> None:
    told = examined(isolated, models.folder(models.conv_net(), tmp_path / "model"), tmp_path / "call")
    assert told["accepted"]
    assert told["refused"] == told["changes"] == []
    assert "built for compute capability 8.9, on no GPU" in told["how"]
    admitted = {p["name"]: p for p in told["precisions"] if p["admitted"]}
    assert set(admitted) == {"fp32", "fp16", "bf16", "int8"}, "it has too few channels for fp8, and no product for int4"


def test_a_model_that_every_precision_takes(isolated: IsolatedRunner, tmp_path: Path) -> None:
    model = models.folder(architectures.bert(layers=1), tmp_path / "model")
    found = {p["name"]: p for p in examined(isolated, model, tmp_path / "call")["precisions"]}
    assert {name for name, p in found.items() if p["admitted"]} == {"fp32", "fp16", "bf16", "int8", "fp8", "int4"}
    assert found["fp8"]["needs"] == "compute capability 8.9 or later"
    assert found["fp8"]["how"].endswith("written in it, and built for compute capability 8.9, on no GPU")


def test_precisions_are_asked_of_the_real_parser_and_builder(isolated: IsolatedRunner, tmp_path: Path) -> None:
    """A product of two activations has nothing to quantize, whatever its operator says of it."""
    nodes = [helper.make_node("MatMul", ["x", "x"], ["y"], name="squared")]
    ends = [models.value("x", ["b", 16, 16])], [models.value("y", ["b", 16, 16])]
    told = examined(isolated, models.folder(models.make_model(nodes, *ends), tmp_path / "model"), tmp_path / "call")
    found = {p["name"]: p for p in told["precisions"]}
    assert {name for name, p in found.items() if p["admitted"]} == {"fp32", "fp16", "bf16"}
    for name, capability in (("fp16", "8.0"), ("bf16", "8.0")):
        assert found[name]["how"] == (
            f"parsed by TensorRT for RTX, written in it, and built for compute capability {capability}, on no GPU"
        )
    assert "no product or convolution that int8 suits" in found["int8"]["reason"]
    assert (found["int4"]["admitted"], found["int4"]["how"]) == (False, "written in it")


def test_what_is_not_asked_is_told_by_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.folder(models.conv_net(), tmp_path / "model")
    known = admits.by_operators(RTX, {"Conv", "Relu"})

    def asked(until: float) -> set[str | None]:
        return {p.how for p in admits.asked(RTX, None, model, known, tmp_path, Recorder(), until) if p.admitted}

    assert asked(time.monotonic() - 1) == {"as it is", "by its operators: the time was over"}
    monkeypatch.setattr(admits, "_LARGEST", 10)
    assert "by its operators: the model is too large to be written in each" in asked(time.monotonic() + 60)


def test_every_node_that_it_refuses(isolated: IsolatedRunner, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="fine"),
        helper.make_node("Det", ["a"], ["d"], name="determinant"),
        helper.make_node("Unique", ["a"], ["u"], name="distinct"),
    ]
    ends = [models.value("x", ["b", 4, 4])], [models.value("d", ["b"]), models.value("u", ["n"])]
    told = examined(isolated, models.folder(models.make_model(nodes, *ends), tmp_path / "model"), tmp_path / "call")
    assert told["accepted"] is False
    assert [(r["node"], r["op"]) for r in told["refused"]] == [("determinant", "Det"), ("distinct", "Unique")]
    assert len(told["changes"]) == 1, "one remedy for both"
    assert {p["name"] for p in told["precisions"] if p["admitted"]} == {"fp32"}


def test_types_and_zero_points_that_it_has_not(isolated: IsolatedRunner, tmp_path: Path) -> None:
    told = examined(isolated, models.folder(models.string_input(), tmp_path / "s"), tmp_path / "call")
    assert (told["refused"][0]["code"], told["refused"][0]["tensor"]) == ("unsupported_input_type", "text")
    told = examined(isolated, models.folder(models.quantized_mlp(), tmp_path / "q"), tmp_path / "call")
    assert (told["refused"][0]["code"], told["refused"][0]["op"]) == ("asymmetric_quantization", "QuantizeLinear")
    assert {p["reason"] for p in told["precisions"] if not p["admitted"]} == {
        "the model is quantized already: its own Q/DQ nodes decide"
    }


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_other_backends_answer_by_building(isolated: IsolatedRunner, backend: str, tmp_path: Path) -> None:
    model = models.folder(models.mlp(), tmp_path / "model")
    assert examined(isolated, model, tmp_path / "call", backend)["accepted"]
    custom = models.folder(models.unknown_op(), tmp_path / "custom")
    told = examined(isolated, custom, tmp_path / "call", backend)
    assert told["accepted"] is False
    assert told["refused"][0]["reason"]


def test_a_backend_that_is_not_here(isolated: IsolatedRunner, tmp_path: Path) -> None:
    model = models.folder(models.mlp(), tmp_path / "model")
    with pytest.raises(StageFailure) as caught:
        examined(isolated, model, tmp_path / "call", "tensorrt")
    assert caught.value.code == "backend_unavailable"


def test_whatever_it_is_given_the_answer_is_typed(isolated: IsolatedRunner, tmp_path: Path) -> None:
    found, untyped = fuzzed(isolated, mutated(60, seed=7), tmp_path)
    assert not untyped
    assert sum(found.values()) == 60
    assert found["accepted"], "some graphs survive"
    assert found["parse_failed"] > 10
