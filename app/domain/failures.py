"""How a stage of a job can fail. A failure says what happened, where, and what to do about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class FailureKind(StrEnum):
    """Who has to act. `model`, `data` and `request` failures are facts about the content: they are cached under the
    stage's key. `infrastructure` failures (a lost worker, storage, disk) are never cached, and are tried again."""

    MODEL = "model"
    DATA = "data"
    REQUEST = "request"
    INFRASTRUCTURE = "infrastructure"


@dataclass
class StageFailure(Exception):
    """Raised by a stage, a backend or the isolation around them.

    `code` is stable snake_case; `node` and `tensor` are names in the user's graph; `remedy` is an imperative sentence.
    `cacheable` is False for what another run may change (time-outs, memory) although the model is to blame.
    """

    code: str
    detail: str
    kind: FailureKind = FailureKind.MODEL
    stage: str | None = None
    node: str | None = None
    tensor: str | None = None
    remedy: str | None = None
    cacheable: bool = True
    reproduce: str | None = None

    def __post_init__(self) -> None:
        super().__init__(f"{self.code}: {self.detail}")

    def to_json(self) -> dict[str, Any]:
        return {k: (str(v) if isinstance(v, FailureKind) else v) for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> StageFailure:
        known = {k: data[k] for k in cls.__dataclass_fields__ if k in data}
        known["kind"] = FailureKind(known.get("kind", "model"))
        return cls(**known)

    def public(self) -> dict[str, Any]:
        """The job's `error` as clients see it."""
        hidden = {"kind", "cacheable", "reproduce"}
        return {k: v for k, v in self.to_json().items() if k not in hidden}


def model_failure(code: str, detail: str, **where: Any) -> StageFailure:
    return StageFailure(code, detail, FailureKind.MODEL, **where)


def data_failure(code: str, detail: str, **where: Any) -> StageFailure:
    return StageFailure(code, detail, FailureKind.DATA, **where)


def infrastructure_failure(code: str, detail: str, **where: Any) -> StageFailure:
    return StageFailure(code, detail, FailureKind.INFRASTRUCTURE, cacheable=False, **where)
