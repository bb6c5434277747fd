"""Stage unchain: an optimized graph of a chain apart again, a model of each of those that it was made of."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from app.domain.chain import MOST_MODELS
from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import ONNX
from workers.graph.chaining import NotCut, cut
from workers.graph.onnx_files import MODEL_FILE, load_model, save_model
from workers.kernel import Stage, StageContext, StageOptions, StageResult, TensorSpec


class UnchainOptions(StageOptions):
    """`borders`: of each model but the last, the tensors ({name, dtype, shape}) that go on to the next one."""

    borders: list[list[dict[str, Any]]] = Field(min_length=1, max_length=MOST_MODELS - 1)


class Unchain(Stage[UnchainOptions]):
    """Input `model` → outputs `part_1`, `part_2`, …, in order. Raises StageFailure `models_merged`: the optimization
    has left no place to cut at."""

    name: ClassVar[str] = "unchain"
    version: ClassVar[int] = 1
    Options = UnchainOptions
    libraries: ClassVar[tuple[str, ...]] = ("onnx",)
    gives: ClassVar[dict[str, str]] = {f"part_{place + 1}": ONNX for place in range(MOST_MODELS)}

    def run(self, ctx: StageContext, options: UnchainOptions) -> StageResult:
        model = load_model(ctx.inputs["model"] / MODEL_FILE)
        borders = [[TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in border] for border in options.borders]
        try:
            parts = cut(model, borders)
        except NotCut as error:
            raise StageFailure(
                "models_merged",
                f"The optimized graph cannot be cut into the models of the chain: {error}.",
                FailureKind.MODEL,
                remedy='Let the whole ship as one engine: "deploy": "merged".',
            ) from error
        names = [f"part_{place}" for place in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            save_model(part, ctx.output(name))
        return StageResult(names)
