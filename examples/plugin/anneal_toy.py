"""An engine of its own for graphs that only add constants: they are added up once, and a call is one addition.

The stage `toy_fold` turns such an ONNX graph into an artifact of a kind of its own, `toy-sum`; the backend `toy` builds
from nothing else. `pip install ./examples/plugin` beside a worker, and its next start offers both.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import numpy_helper

from app.domain.failures import StageFailure, model_failure
from workers.artifacts import ONNX
from workers.backends.bundle_script import HURRY, infer_script
from workers.candidates import Candidate, Case, Proposal, Skipped, Step
from workers.graph.onnx_graph import model_specs
from workers.kernel import (
    Backend,
    BackendInfo,
    Reporter,
    Session,
    Stage,
    StageContext,
    StageOptions,
    StageResult,
    TensorSpec,
)

TOY_SUM = "toy-sum"  # `sum.npy`, and `sum.json`: names, types and shapes of the input and the output


class FoldOptions(StageOptions):
    """There is nothing to choose."""


class Fold(Stage[FoldOptions]):
    """Input `model` → output `model`, the sum of its constants. `data`: added, how many there were."""

    name = "toy_fold"
    version = 1  # to be raised when the code gives another output for the same input
    Options = FoldOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx")
    takes: ClassVar[tuple[str, ...]] = (ONNX,)
    gives: ClassVar[Mapping[str, str]] = {"model": TOY_SUM}
    reported: ClassVar[tuple[str, ...]] = ("added",)

    def run(self, ctx: StageContext, options: FoldOptions) -> StageResult:
        model = onnx.load(ctx.inputs["model"] / "model.onnx")
        constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        total = np.zeros((), np.float32)
        for node in model.graph.node:
            known = [name for name in node.input if name in constants]
            if node.op_type != "Add" or len(known) != 1:
                raise model_failure("not_a_sum", f"{node.op_type} adds no constant.", node=node.name)
            total = total + constants[known[0]]
        out = ctx.output("model")
        np.save(out / "sum.npy", total)
        told = [[{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in s_] for s_ in model_specs(model)]
        (out / "sum.json").write_text(json.dumps(dict(zip(("inputs", "outputs"), told, strict=True)), sort_keys=True))
        return StageResult(("model",), {"added": len(model.graph.node)})


class ToySession(Session):
    def __init__(self, folder: Path) -> None:
        self._sum = np.load(folder / "sum.npy", allow_pickle=False)
        told = json.loads((folder / "sum.json").read_text())
        self.inputs, self.outputs = (
            tuple(TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in told[side])
            for side in ("inputs", "outputs")
        )

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {self.outputs[0].name: feeds[self.inputs[0].name] + self._sum}
        except (KeyError, ValueError) as error:
            raise StageFailure("inference_failed", str(error)) from error

    def call(self, feeds: Mapping[str, Any]) -> Callable[[], Any]:
        return lambda: self.run(feeds)


class ToyBackend(Backend):
    name: ClassVar[str] = "toy"
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)  # of the engine; this package's own version is part of all keys
    accepts: ClassVar[tuple[str, ...]] = (TOY_SUM,)
    engine_format: ClassVar[str] = "toy-engine"
    script_hurry: ClassVar[tuple[str, ...]] = HURRY

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        return BackendInfo(self.name, {"numpy": np.__version__}, ("cpu",), ("fp32",))

    def propose(self, case: Case) -> Proposal:
        if set(case.ops) != {"Add"}:
            return Proposal(skipped=(Skipped(self.name, "the model does more than to add constants"),))
        steps = (Step("toy_fold", {}),)
        return Proposal((Candidate("toy-sum", "one sum", self.name, "fp32", steps, lossless=True, prior=0.1),))

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return dict(runtime)

    def build(
        self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter, kind: str = TOY_SUM
    ) -> dict[str, Any]:
        for path in model.iterdir():
            shutil.copyfile(path, out / path.name)
        return {"runtime": {}}

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        return ToySession(engine)

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return infer_script(library="numpy", version=np.__version__, imports="", loader=_LOADER)


_LOADER = '''
def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name; one addition needs no threads."""
    told, total = json.loads((HERE / "sum.json").read_text()), np.load(HERE / "sum.npy", allow_pickle=False)
    (given,), (made,) = told["inputs"], told["outputs"]
    return [given["name"]], lambda feeds: {made["name"]: feeds[given["name"]] + total}
'''
