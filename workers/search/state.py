"""What a search knows: the job's facts, and how far each candidate came. Values: the policy answers new ones.

A candidate goes proposed → built → screened (timed shortly) → checked (its accuracy on a few samples) → finalist, or
is refused on the way, with the reason. What is mended is checked before it is screened. Only what fell for want of time
may come back, where there is nobody else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.candidates import Candidate, Step
from workers.pipeline.checks import Check
from workers.search.halving import Speed


class Standing(StrEnum):
    PROPOSED = "proposed"
    BUILT = "built"
    SCREENED = "screened"
    CHECKED = "checked"
    FINALIST = "finalist"
    REFUSED = "refused"


class Phase(StrEnum):
    """What the search is at; `policy` has the order."""

    MAKING = "making"
    MADE = "made"
    TIMING = "timing"
    SCREENED = "screened"
    CHECKING = "checking"
    MENDING = "mending"
    MENDED = "mended"
    VARYING = "varying"
    TUNED = "tuned"
    PAIRING = "pairing"
    PAIR_VARYING = "pair varying"
    BORDER = "border"
    CHOOSING = "choosing"
    EVERY_VARIANT = "every variant"
    CHECKING_ALL = "checking all"
    OVER = "over"


@dataclass(frozen=True)
class Facts:
    """Of one job, known before anything is tried. `products`: whether the graph multiplies matrices. `judging`,
    `calibrating`: samples there are for each; `same_data`: of one data set. `fixed_batch`: the only batch size that the
    model takes. `free_axes`: beside the batch. `memory_bytes`: of what holds the engines. `batched`: whether an input
    tells the batch size. `training`: the steps that train the job's weights, where they may be, on so many
    `training_samples`; `training_instead`: by stage, the steps that take its place behind them."""

    spec: OptimizationSpec
    products: bool
    has_calibration: bool
    has_data: bool
    judging: int
    calibrating: int
    same_data: bool
    original_bytes: int
    fixed_batch: int | None
    free_axes: bool
    memory_bytes: float
    batched: bool = True
    training: tuple[Step, ...] = ()
    training_samples: int = 0
    training_instead: Mapping[str, Step] = field(default_factory=dict)

    @property
    def batch_sizes(self) -> list[int]:
        """Those of the job; the only one that a model with a fixed batch takes."""
        return self.spec.benchmark.batch_sizes if self.fixed_batch is None else [self.fixed_batch]


@dataclass(frozen=True)
class Deadlines:
    """The job's time, in seconds since its budget began: `end` is when all but the package has to be done."""

    seconds: float
    end: float
    make_until: float
    search_until: float
    final_seconds: float = 0.0


@dataclass(frozen=True)
class Built:
    """An engine. `engine`: the digest of its files. `graph`: the key of what it was built from. `runtime`: what it is
    loaded with. `seconds`: that each graph step took, and the build. `reuses`: keeping further nodes of it in higher
    precision takes no new calibration."""

    engine: str
    size_bytes: int
    graph: str
    runtime: Mapping[str, Any]
    seconds: tuple[float, ...]
    reuses: bool = False


@dataclass(frozen=True)
class CandidateState:
    """`of`: the engine that it loads with other options; `base`: the one that it was mended from. `figures`: of the
    last short timing, made at `figures_at`. `accuracy`: the data of the last check, on `asked` samples; `most_asked`:
    on so many it was asked for; `all_seconds`: what a check on all would take. `settled`: no further check of it is
    due; `kept`: whether it keeps the limit, as far as the search can tell. `failure`: of a stage, for which it fell.
    `late`: it fell for want of time; `slow_elsewhere`: for nothing but being slower than the original at another batch
    size. `passed`: phase and reason for which it was not checked, which hold while others
    do."""

    plan: Candidate
    of: str | None = None
    base: str | None = None
    built: Built | None = None
    speed: Speed | None = None
    figures: Mapping[str, Any] | None = None
    figures_at: str | None = None
    accuracy: Mapping[str, Any] | None = None
    asked: int = 0
    most_asked: int = 0
    all_seconds: float = 0.0
    settled: bool = False
    kept: bool | None = None
    shapes: Mapping[str, Any] | None = None
    shapes_asked: bool = False
    mending_tried: bool = False
    refused: str | None = None
    failure: Mapping[str, Any] | None = None
    missed: Check | None = None
    late: bool = False
    slow_elsewhere: bool = False
    passed: tuple[str, str] | None = None
    finalist: bool = False
    history: tuple[Mapping[str, Any], ...] = ()

    @property
    def standing(self) -> Standing:
        if self.refused is not None:
            return Standing.REFUSED
        if self.finalist:
            return Standing.FINALIST
        if self.accuracy is not None:
            return Standing.CHECKED
        if self.speed is not None:
            return Standing.SCREENED
        return Standing.PROPOSED if self.built is None else Standing.BUILT

    @property
    def alive(self) -> bool:
        return self.built is not None and self.refused is None

    @property
    def loss(self) -> Mapping[str, Any]:
        """The data of its last check; empty where there was none."""
        return self.accuracy or {}


@dataclass(frozen=True)
class Making:
    """Candidates that are still to be built. `rest`: seconds that those took which need no calibration; `half`: of the
    time for building; `safe`: whether an engine was built that computes as the original does. `told`: of how many."""

    queue: tuple[str, ...]
    then: Phase
    begun: float
    half: float
    told: int
    rest: float = 0.0
    safe: bool = False


@dataclass(frozen=True)
class Timing:
    """A short timing in groups that memory holds. `asked`: when the group that is out was asked for."""

    name: str
    seconds: float
    batch_sizes: tuple[int, ...] | None
    groups: tuple[tuple[str, ...], ...]
    told: int
    then: Phase
    asked: float = 0.0


@dataclass(frozen=True)
class Way:
    """One to win accuracy back: another `candidate`, or nodes in higher precision (None). `gain`: expected, as the
    logarithm of what is faster then; `seconds`: that it takes."""

    candidate: Candidate | None
    gain: float
    seconds: float


@dataclass(frozen=True)
class Mending:
    """What is tried for one candidate. `ways`: yet to try, in this order; `remaking`: seconds that have to be left for
    one that quantizes anew. `ranking`: whether the sensitivity is asked for; `ranked`: nodes, those first that are
    worth most in higher precision; `shares`: of all work, that so many of them have. `keep`: so many of them are tried
    next, 0 where no more are; `failed` were too few, `held` are enough (0: none yet). `training`: whether weights are
    trained for it; `trained`: who has them, where they alone did not hold. `trying`: who is being made and checked.
    `best`: who keeps the limit."""

    of: str
    until: float
    ways: tuple[Way, ...]
    remaking: float
    ranking: bool = False
    ranked: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    keep: int = 0
    failed: int = 0
    held: int = 0
    training: bool = False
    trained: str | None = None
    trying: str | None = None
    best: str | None = None

    @property
    def graph_of(self) -> str:
        """Whose graph is quantized otherwise."""
        return self.trained or self.of


@dataclass(frozen=True)
class Pair:
    """Two engines for one bundle: `small` answers batches up to `most`, `large` the others; the baseline's id stands
    for the original itself. `border`: the sizes between which one overtakes the other; nothing was timed between them.
    `gains`: of a short timing, by id and batch size. `varied`: their engines with other runtime options, which are
    still to be timed."""

    small: str
    large: str
    most: int
    border: tuple[int, int]
    gains: Mapping[str, Mapping[str, float]]
    varied: tuple[str, ...] = ()


@dataclass
class SearchState:
    """`queue`: whom the phase is still to look at. `accurate`: who was checked in this round and keeps the limit.
    `took`: seconds of the last check, `check_asked`: when it was begun. `few`: samples of the next small check;
    `apart`: whether the search looks at samples of its own. `probes`: whether the original gets through other shapes.
    `seconds_each`: that the last short timing took per engine and batch size. `original`: its figures there;
    `sample_ms`: what it takes for a sample. `untrained`: for whom no way but training is left. `in_vain`: graphs that
    could not be mended, and whose they were. `reached`: the speed that mending has to beat. `pair`: who shall answer
    together."""

    candidates: dict[str, CandidateState]
    deadlines: Deadlines
    phase: Phase
    few: int
    making: Making | None = None
    timing: Timing | None = None
    mending: Mending | None = None
    queue: tuple[str, ...] = ()
    accurate: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()
    tuned: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    check_asked: float | None = None
    took: float = 0.0
    apart: bool = True
    probes: bool = True
    seconds_each: float = 0.0
    original: Mapping[str, Any] | None = None
    sample_ms: float = 0.0
    in_vain: Mapping[tuple[str, str], str] = field(default_factory=dict)
    reached: float = 0.0
    pair: Pair | None = None
    phases: tuple[Mapping[str, Any], ...] = ()
    phase_began: float = 0.0
    exhausted: bool = False
    out_of_reach: bool = False
    finalists: tuple[str, ...] = ()
    stopped: Mapping[str, Any] | None = None  # a failure that ends the job

    def copy(self) -> SearchState:
        """Another one with the same contents, of which all but the table of candidates is immutable."""
        return replace(self, candidates=dict(self.candidates))
