"""A backend, as a package of its own has one, whose candidates go through stages that no engine of this machine needs:
what makes graphs ready for GPUs. It builds nothing of them: another backend's engine ships."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from app.domain.failures import model_failure
from workers.artifacts import EXPORTED_PROGRAM, ONNX
from workers.candidates import Candidate, Case, Proposal, Step
from workers.kernel import Backend, BackendInfo, Reporter, Session

_CALIBRATED = ("calibration",)
_OF_GRAPHS = (
    Step("convert", {"recipe": "int8", "part": "calibration"}, _CALIBRATED),
    Step("equalize", {"alpha": 0.5, "part": "calibration"}, _CALIBRATED),
)
_OF_PROGRAMS = (Step("observe", {"part": "calibration"}, _CALIBRATED),)


class OddSteps(Backend):
    name: ClassVar[str] = "odd-steps"
    accepts: ClassVar[tuple[str, ...]] = (ONNX, EXPORTED_PROGRAM)
    engine_format: ClassVar[str] = "none"

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:
        return BackendInfo(self.name, {}, ("cpu",), ("fp32",))

    def propose(self, case: Case) -> Proposal:
        steps = _OF_PROGRAMS if EXPORTED_PROGRAM in case.kinds else _OF_GRAPHS
        return Proposal(
            tuple(Candidate(f"odd-{s.stage}", f"through {s.stage}", self.name, "fp32", (s,), prior=0.1) for s in steps)
        )

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:
        return ()

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:
        return dict(runtime)

    def build(
        self, model: Path, out: Path, options: Mapping[str, Any], reporter: Reporter, kind: str = ONNX
    ) -> dict[str, Any]:
        raise model_failure("nothing_to_build", "This backend builds nothing.")

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        raise model_failure("nothing_to_load", "This backend loads nothing.")

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        return ""
