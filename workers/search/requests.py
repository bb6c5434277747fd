"""What a search asks for, and what it is told: plain data, so that whoever has the job's model and data can answer.

A request names its candidates in full: who answers makes what it does not hold, which costs nothing where the stage
calls are known. So a request can be given to another worker (`calls`), and its answer comes back as JSON.

Answers: a mapping. `failed`: why the candidate is out; beside it
- `Make`: `built` (as `state.Built`)
- `Judge`: `accuracy` (data of the stage `validate`), `asked` (samples), `sound` (False: its outputs are broken),
  `all_seconds` (what a check on all would take); or `undefined`, the failure of a metric that so few samples do not
  define
- `TryShapes`: `shapes` (None: nothing was found out), `probes` (whether the original itself gets through)
- `Time`: `engines` {id: figures}, `batch_sizes`, `at`; or `failure` {code, detail} of the timing as a whole
- `Rank`: `nodes` [{name, error, work}], the worst first, and `metric` (what the error is); or `why_not`
- `Refer`, `Examine`, `Confirm`: nothing more; what was found out is in storage
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.candidates import Candidate, Rounding, Step

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Subject:
    """A candidate; and the one that it was mended from, whose calibration serves it."""

    candidate: Candidate
    base: Candidate | None = None

    @property
    def id(self) -> str:
        return self.candidate.id


@dataclass(frozen=True)
class Make:
    """Graph steps and build. `until`: when it should be done, in seconds of the budget, as below."""

    subject: Subject
    until: float


@dataclass(frozen=True)
class Judge:
    """Its accuracy on so many samples; `apart`: of those that the search may look at, else of all that judge."""

    subject: Subject
    samples: int
    apart: bool
    until: float


@dataclass(frozen=True)
class TryShapes:
    """Whether it answers as the original does, called from the shortest shape on."""

    subject: Subject
    until: float


@dataclass(frozen=True)
class Time:
    """These side by side with the original, shortly: `seconds` per engine and batch size (None: the job's)."""

    subjects: tuple[Subject, ...]
    seconds: float
    batch_sizes: tuple[int, ...] | None
    until: float


@dataclass(frozen=True)
class Rank:
    """The nodes of a quantized candidate, by what their quantization costs, on so many samples."""

    subject: Subject
    samples: int
    until: float


@dataclass(frozen=True)
class Refer:
    """The original's outputs on the samples that will confirm. Like `Confirm` no request of the search, but of the job
    that it is for."""

    until: float


@dataclass(frozen=True)
class Examine:
    """Whether this backend, which a worker can ask but not run, takes the model: likewise."""

    backend: str
    until: float


@dataclass(frozen=True)
class Confirm:
    """Its accuracy on the samples that nobody chose by, with a bound of so much confidence."""

    subject: Subject
    confidence: float
    apart: bool
    until: float


@dataclass(frozen=True)
class Done:
    """The search is over. `finalists`: who is worth the full method. `out_of_reach`: nobody, the original included, can
    meet the constraints."""

    finalists: tuple[str, ...]
    exhausted: bool = False
    out_of_reach: bool = False


@dataclass(frozen=True)
class Stopped:
    """The job cannot go on. `failure`: a StageFailure as JSON."""

    failure: Mapping[str, Any]


Request = Make | Judge | TryShapes | Time | Rank | Refer | Examine | Confirm


@dataclass(frozen=True)
class Ahead:
    """What will be asked after what is asked now, so that it can be answered before. `sure`: whatever comes out,
    but for want of time; else only if somebody faster falls."""

    request: Make | Judge | Refer | Examine | Confirm
    sure: bool


_KINDS: dict[str, type[Request]] = {
    "make": Make,
    "judge": Judge,
    "try_shapes": TryShapes,
    "time": Time,
    "rank": Rank,
    "refer": Refer,
    "examine": Examine,
    "confirm": Confirm,
}


def to_json(request: Request) -> dict[str, Any]:
    kind = next(name for name, cls in _KINDS.items() if isinstance(request, cls))
    return {"kind": kind, **dataclasses.asdict(request)}


def from_json(data: Mapping[str, Any]) -> Request:
    found = dict(data)
    cls = _KINDS[found.pop("kind")]
    if "subject" in found:
        found["subject"] = _subject(found["subject"])
    if "subjects" in found:
        found["subjects"] = tuple(_subject(s) for s in found["subjects"])
    if found.get("batch_sizes") is not None:
        found["batch_sizes"] = tuple(found["batch_sizes"])
    return cls(**found)


def subjects_of(request: Request) -> tuple[Subject, ...]:
    if isinstance(request, Refer | Examine):
        return ()
    return request.subjects if isinstance(request, Time) else (request.subject,)


def _subject(data: Mapping[str, Any]) -> Subject:
    base = data.get("base")
    return Subject(candidate_from_json(data["candidate"]), None if base is None else candidate_from_json(base))


def candidate_from_json(data: Mapping[str, Any]) -> Candidate:
    return Candidate(**{**data, "steps": tuple(map(step_from_json, data["steps"]))})


def step_from_json(data: Mapping[str, Any]) -> Step:
    told = data["rounding"]
    rounding = None if told is None else Rounding(tuple(told["calibrations"]), told["in_onnx"])
    return Step(data["stage"], data["options"], tuple(data["extra"]), rounding, data.get("group"))
