"""Eight candidates, as a package of its own has them, for models that only add constants (`examples/plugin`): each
takes TOY_SECONDS to make, and no processor time, so that a small machine shows what several would do."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from anneal_toy import TOY_SUM, Fold, FoldOptions, ToyBackend
from pydantic import Field

from workers.artifacts import ONNX
from workers.candidates import Candidate, Case, Proposal, Step
from workers.kernel import BackendInfo, Stage, StageContext, StageOptions, StageResult

COUNT = 8


class SlowFoldOptions(StageOptions):
    number: int = Field(ge=0)
    seconds: float = Field(ge=0)


class SlowFold(Stage[SlowFoldOptions]):
    """As `toy_fold`, after a while; `number` makes it another engine."""

    name = "toy_slow_fold"
    version = 1
    Options = SlowFoldOptions
    libraries: ClassVar[tuple[str, ...]] = ("numpy", "onnx")
    takes: ClassVar[tuple[str, ...]] = (ONNX,)
    gives: ClassVar[Mapping[str, str]] = {"model": TOY_SUM}

    def run(self, ctx: StageContext, options: SlowFoldOptions) -> StageResult:
        time.sleep(options.seconds)
        (ctx.output("model") / "number.txt").write_text(str(options.number))
        return Fold().run(ctx, FoldOptions())


class EightToys(ToyBackend):
    name: ClassVar[str] = "toy-eight"

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        found = super().probe(hardware)
        return None if found is None else BackendInfo(self.name, found.versions, found.devices, found.precisions)

    def propose(self, case: Case) -> Proposal:
        seconds = float(os.environ.get("TOY_SECONDS", "0"))
        return Proposal(
            tuple(
                Candidate(f"toy-{n}", f"toy {n}", self.name, "fp32", (step,), lossless=True, prior=0.1)
                for n in range(COUNT)
                for step in [Step("toy_slow_fold", {"number": n, "seconds": seconds})]
            )
        )
