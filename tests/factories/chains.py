"""Chains of models, and what the stages make of them without a job around."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, helper

from tests.factories import onnx_models as models
from tests.unit.test_bundle import Notes
from workers.kernel import StageContext, backends
from workers.stages.chain import Chain, ChainOptions
from workers.stages.unchain import Unchain, UnchainOptions


def encoder(features: int = 8, width: int = 16, *, seed: int = 1, opset: int = models.OPSET) -> ModelProto:
    """`input` [batch, features] → `embedding` [batch, width]."""
    model = models.mlp(features=features, classes=width, seed=seed, opset=opset)
    model.graph.output[0].name = model.graph.node[-1].output[0] = "embedding"
    return model


def head(width: int = 16, classes: int = 4, *, seed: int = 2, opset: int = models.OPSET) -> ModelProto:
    """`embedding` [n, width] and `weight` [n, 1] → `logits` [n, classes], the weighted embedding's."""
    model = models.mlp(features=width, classes=classes, seed=seed, opset=opset, batch="n")
    model.graph.input[0].name = "embedding"
    model.graph.input.append(models.value("weight", ["n", 1]))
    model.graph.node.insert(0, helper.make_node("Mul", ["embedding", "weight"], ["weighted"], name="weigh"))
    model.graph.node[1].input[0] = "weighted"
    return model


def pixels(features: int = 8) -> ModelProto:
    """What comes before a network: `pixels` [batch, features], uint8 → `input` in −1 … 1."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["scaled"], name="scale"),
        helper.make_node("Sub", ["scaled", "one"], ["input"], name="shift"),
    ]
    return models.make_model(
        nodes,
        [models.value("pixels", ["batch", features], TensorProto.UINT8)],
        [models.value("input", ["batch", features])],
        [models.tensor("scale", 127.5), models.tensor("one", 1.0)],
    )


def chained(
    parts: Sequence[ModelProto], folder: Path, connect: Sequence[Mapping[str, str] | None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of the model that the stage `chain` makes of them, and its data."""
    given = {
        "model" if place == 0 else f"model_{place}": models.folder(part, folder / f"part-{place}")
        for place, part in enumerate(parts)
    }
    (folder / "chaining").mkdir()
    context = StageContext(given, folder / "chaining", folder / "chained", Notes(), {})
    told = [None if c is None else dict(c) for c in connect or [None] * (len(parts) - 1)]
    result = Chain().run(context, ChainOptions(connect=told))
    return folder / "chained/model", dict(result.data)


def engines(
    backend: str, parts: Sequence[ModelProto], folder: Path, connect: Sequence[Mapping[str, str] | None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """An engine of each model of the chain, as a job that wants them apart has them, and how they are loaded."""
    model, data = chained(parts, folder, connect)
    context = StageContext({"model": model}, folder / "chaining", folder / "cut", Notes(), {})
    names = Unchain().run(context, UnchainOptions(borders=data["borders"])).outputs
    built, engine = backends()[backend](), folder / "engine"
    told = []
    for name in names:
        out = engine / name
        out.mkdir(parents=True)
        runtime = built.build(folder / "cut" / name, out, {}, Notes())["runtime"]
        told.append({"folder": name, "backend": backend, "runtime": runtime})
    inputs = {t["name"]: t for model in data["models"] for t in model["inputs"] if t["name"] in model["taken"]}
    return engine, {"engines": told, "inputs": [*inputs.values()], "outputs": [*data["renamed"].values()]}
