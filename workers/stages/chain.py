"""Stage chain: several exported models as one ONNX model, in which what each gives goes to the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field

from app.domain.chain import MOST_MODELS, NotJoined, join
from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import ONNX
from workers.graph.chaining import NotMerged, merge
from workers.graph.onnx_files import MODEL_FILE, load_model, save_model
from workers.graph.onnx_graph import model_specs
from workers.kernel import Stage, StageContext, StageOptions, StageResult, TensorSpec

_REMEDY = (
    "GET /v1/models/{id} tells inputs and outputs of each model: name in `connect` what goes where, or export a model "
    "again so that it fits (of one opset, with a cast or a transpose in front)."
)


class ChainOptions(StageOptions):
    """`connect`: of each model behind the first, its inputs with the outputs that go there, or None
    (`app.domain.chain.Link`)."""

    connect: list[dict[str, str] | None] = Field(min_length=1, max_length=MOST_MODELS - 1)


class Chain(Stage[ChainOptions]):
    """Inputs `model`, `model_1`, …: ONNX, in the order of the chain → output `model`, one ONNX model. The names of its
    tensors begin with the model's number, but for its inputs and outputs.

    data: models (of each: inputs, outputs, taken: those of the whole's inputs that it takes), borders (of each model
    but the last: the tensors that go on to the next one), joints and connect (of each model but the first: its input →
    the border's tensor, and the output of the model before that this is), renamed (outputs that have another name in
    the whole). Raises StageFailure `chain_does_not_fit`."""

    name: ClassVar[str] = "chain"
    version: ClassVar[int] = 1
    Options = ChainOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnx",)
    gives: ClassVar[Mapping[str, str]] = {"model": ONNX}

    def run(self, ctx: StageContext, options: ChainOptions) -> StageResult:
        folders = [ctx.inputs["model"], *(ctx.inputs[f"model_{i + 1}"] for i in range(len(options.connect)))]
        models = [load_model(folder / MODEL_FILE) for folder in folders]
        interfaces = [tuple([_json(spec) for spec in specs] for specs in model_specs(model)) for model in models]
        try:
            joined = join([(inputs, outputs) for inputs, outputs in interfaces], options.connect)
            whole, joints = merge(models, joined)
        except NotJoined as error:
            where = f"Models {error.model} and {error.model + 1} of the chain do not fit: {error}."
            raise _failure(where, error.input) from error
        except NotMerged as error:
            raise _failure(f"The models of the chain cannot stand in one graph: {error}.") from error
        ctx.reporter.progress(0.6, "writing")
        save_model(whole, ctx.output("model"))
        told = []
        for (inputs, outputs), taken in zip(interfaces, joined.taken, strict=True):
            told.append({"inputs": inputs, "outputs": outputs, "taken": taken})
        borders = []
        for place, bound in enumerate(joints):
            specs = {spec["name"]: spec for spec in interfaces[place][1]}
            given = {tensor: specs[joined.joints[place][own]] for own, tensor in bound.items()}
            borders.append([{**s, "name": n, "shape": joined.sized(place, s["shape"])} for n, s in given.items()])
        data: dict[str, Any] = {"models": told, "borders": borders, "joints": joints, "renamed": joined.renamed}
        data["connect"] = joined.joints
        return StageResult(("model",), data)


def _json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _failure(detail: str, tensor: str | None = None) -> StageFailure:
    return StageFailure("chain_does_not_fit", detail, FailureKind.REQUEST, tensor=tensor, remedy=_REMEDY)
