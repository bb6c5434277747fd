"""A candidate in a job, and how far it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from app.domain.artifact_key import ArtifactRef
from app.domain.failures import StageFailure
from workers.candidates import Candidate
from workers.pipeline.select import Tried
from workers.pipeline.stage_calls import Outcome


@dataclass
class CandidateRun:
    """A candidate and how far it came. `screened`: its figures of the last short timing, made at `screened_at`.
    `validate`: the last check of the search, `confirmed`: what the verdict goes by. `history`: what the search found
    and decided, in order."""

    has_rivals: ClassVar[bool] = False  # whether it is compared with the other engines, not with the original alone
    plan: Candidate
    tried: Tried
    graph: Outcome | None = None
    build: Outcome | None = None
    validate: Outcome | None = None
    confirmed: Outcome | None = None
    steps: list[Outcome] = field(default_factory=list)
    failure: StageFailure | None = None
    screened: Mapping[str, Any] | None = None
    screened_at: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    sensitivity: Outcome | None = None

    @classmethod
    def of(cls, candidate: Candidate) -> CandidateRun:
        tried = Tried(candidate.id, candidate.precision, candidate.lossless, narrows=candidate.narrows)
        run = cls(candidate, tried)
        if candidate.narrows:
            run.note("plan", "not lossless", candidate.narrows)
        return run

    @property
    def selected(self) -> Mapping[str, Any]:
        """What the search knew of its accuracy, on samples that it chose by."""
        return self.validate.data if self.validate else {}

    @property
    def figures(self) -> Mapping[str, Any]:
        """The full measurement, or the last short one."""
        return self.tried.figures or self.screened or {}

    @property
    def runtime(self) -> dict[str, Any]:
        """What the engine is loaded with: the build's options under the candidate's own."""
        assert self.build is not None
        return {**self.build.data["runtime"], **self.plan.runtime}

    @property
    def engine(self) -> ArtifactRef:
        assert self.build is not None
        return self.build.outputs["engine"]

    @property
    def loadable(self) -> bool:
        """Whether there is an engine."""
        return self.build is not None

    @property
    def recipe(self) -> str:
        return self.plan.recipe

    @property
    def parts(self) -> list[CandidateRun]:
        """The candidates whose engines it holds: itself alone, but for two in one bundle."""
        return [self]

    @property
    def judged_digest(self) -> str:
        """Of the files whose accuracy was judged, as the stage saw them."""
        judged = self.confirmed or self.validate
        assert judged is not None
        return str(judged.data["engine_digest"])

    def drop(self, phase: str, reason: str) -> None:
        """Out of the race, for this reason. The first one stands."""
        if self.tried.failed is None:
            self.tried.failed = reason
            self.note(phase, "dropped", reason)

    def note(self, phase: str, decision: str, reason: str | None = None, **facts: Any) -> None:
        entry = {"phase": phase, "decision": decision, "reason": reason, **facts}
        self.history.append({k: v for k, v in entry.items() if v is not None})
