"""What a backend says of a graph before anything is optimized: whether it takes it, and what of it it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from app.domain.failures import StageFailure

MOST_REFUSED = 100


@dataclass(frozen=True)
class Refused:
    """Something that the backend does not take, and what to do about it. `node`: its name, or `#` and its place;
    `op`: of that node."""

    code: str
    reason: str
    node: str | None = None
    op: str | None = None
    tensor: str | None = None
    remedy: str | None = None

    @classmethod
    def of(cls, failure: StageFailure) -> Refused:
        return cls(failure.code, failure.detail, failure.node, None, failure.tensor, failure.remedy)


@dataclass(frozen=True)
class Precision:
    """`admitted`: whether something of the graph can be in it; `reason` says why not. `needs`: of the device. `how`:
    what was done to find out."""

    name: str
    admitted: bool
    reason: str | None = None
    needs: str | None = None
    how: str | None = None


@dataclass(frozen=True)
class Examined:
    """`accepted`: None where it could not be told in the time. `how`: what was done to find out. `notes`: what a user
    should know of a model that is taken."""

    accepted: bool | None
    how: str
    refused: Sequence[Refused] = ()
    precisions: Sequence[Precision] = ()
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """`refused`: the first 100, `refused_count` all of them; `changes`: what to do, each said once."""
        shown = self.refused[:MOST_REFUSED]
        return {
            "accepted": self.accepted,
            "how": self.how,
            "refused": [asdict(r) for r in shown],
            "refused_count": len(self.refused),
            "precisions": [asdict(p) for p in self.precisions],
            "changes": list(dict.fromkeys(r.remedy for r in self.refused if r.remedy)),
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }
