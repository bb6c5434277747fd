"""Two engines of a job in one bundle: an engine of its own to everybody else, made of files that were judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from app.domain.artifact_key import ArtifactRef, digest_of
from app.domain.spec import OptimizationSpec
from workers import kernel
from workers.candidates import Candidate
from workers.kernel import TensorSpec
from workers.measure.axes import batch_axes
from workers.members import chooser_of
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.select import Tried, worse_of
from workers.search.objective import BASELINE
from workers.search.state import Pair

ID = "two-engines"


@dataclass(frozen=True)
class Side:
    """One of the two, and the largest batch that it answers (None: all others). `run`: None stands for the original,
    which is loaded as the baseline is. `gains`: of the short timing, by batch size."""

    folder: str
    run: CandidateRun | None
    engine: ArtifactRef
    backend: str
    runtime: Mapping[str, Any]
    precision: str
    most: int | None
    tried: Tried
    gains: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.run.plan.name if self.run else "the original"


@dataclass
class PairRun(CandidateRun):
    """The two as one candidate. `border`: the batch sizes between which one overtakes the other; between them nothing
    was timed. `choice`: how their backend knows the batch size (`input`, `axis`)."""

    has_rivals: ClassVar[bool] = True
    sides: tuple[Side, ...] = ()
    border: tuple[int, int] = (1, 2)
    choice: Mapping[str, Any] | None = None

    @property
    def engine(self) -> ArtifactRef:
        """The files that were judged, under the names of their folders."""
        files = (replace(f, name=f"{s.folder}/{f.name}") for s in self.sides for f in s.engine.files)
        return ArtifactRef(tuple(files))

    @property
    def runtime(self) -> dict[str, Any]:
        told = [
            {"folder": s.folder, "backend": s.backend, "runtime": dict(s.runtime), "most": s.most} for s in self.sides
        ]
        return {**(self.choice or {}), "engines": told}

    @property
    def loadable(self) -> bool:
        return True

    @property
    def recipe(self) -> str:
        return "; ".join(f"{_batches(s, self.sides)}: {s.run.recipe if s.run else s.name}" for s in self.sides)

    @property
    def parts(self) -> list[CandidateRun]:
        return [s.run for s in self.sides if s.run is not None]

    @property
    def judged_digest(self) -> str:
        """Its own where each engine's files are those that were judged."""
        same = all(s.run is None or s.run.judged_digest == s.engine.digest for s in self.sides)
        return self.engine.digest if same else digest_of([s.engine.digest for s in self.sides])

    def answers(self, batch: int) -> Side:
        """Who a batch of this size goes to."""
        return next(s for s in self.sides if s.most is None or batch <= s.most)


def together(evaluator: Evaluator, pair: Pair, runs: Sequence[CandidateRun]) -> PairRun | None:
    """None where one of the two fell after the search."""
    chooser = chooser_of(kernel.backends()[evaluator.baseline_backend].device)
    inputs = [TensorSpec(i["name"], i["dtype"], tuple(i["shape"])) for i in evaluator.export.data["inputs"]]
    place = next(((name, axis) for name, axis in batch_axes(inputs).items() if axis is not None), None)
    known = {run.plan.id: run for run in runs}
    both = [known.get(pair.small), known.get(pair.large)]
    if chooser is None or place is None or any(r is not None and _fell(r) for r in both):
        return None
    limits = (("small", pair.small, pair.most), ("large", pair.large, None))
    sides = tuple(
        _side(evaluator, folder, run, most, pair.gains.get(cid, {}))
        for (folder, cid, most), run in zip(limits, both, strict=True)
    )
    return _pair_of(evaluator.spec, chooser.name, sides, pair.border, {"input": place[0], "axis": place[1]})


def _fell(run: CandidateRun) -> bool:
    return run.tried.failed is not None or bool((run.tried.accuracy or {"broken": True}).get("broken"))


def _side(
    evaluator: Evaluator, folder: str, run: CandidateRun | None, most: int | None, gains: Mapping[str, float]
) -> Side:
    if run is None:
        engine, backend = evaluator.export.outputs["model"], evaluator.baseline_backend
        precision = "int8" if evaluator.export.data.get("structure", {}).get("quantized") else "fp32"
        return Side(folder, None, engine, backend, {}, precision, most, Tried(BASELINE, precision, True), gains)
    return Side(folder, run, run.engine, run.plan.backend, run.runtime, run.plan.precision, most, run.tried, gains)


def _pair_of(
    spec: OptimizationSpec, backend: str, sides: tuple[Side, ...], border: tuple[int, int], choice: Mapping[str, Any]
) -> PairRun:
    names = [f"{s.name} for {_batches(s, sides)}" for s in sides]
    narrows = "; ".join(r.plan.narrows for s in sides if (r := s.run) is not None and r.plan.narrows) or None
    plan = Candidate(
        id=ID,
        name=", ".join(names),
        backend=backend,
        precision="+".join(dict.fromkeys(s.precision for s in sides)),
        steps=(),
        lossless=not narrows and all(s.run is None or s.run.plan.lossless for s in sides),
        narrows=narrows,
    )
    run = PairRun(plan, Tried(ID, plan.precision, plan.lossless, narrows=narrows), sides=sides, border=border)
    run.choice = choice
    sizes = [str(b) for b in spec.benchmark.batch_sizes]
    run.tried.served = {size: run.answers(int(size)).tried for size in sizes}
    run.tried.accuracy = worse_of(spec, run.tried).accuracy
    run.note(
        "final", "two engines in one bundle", "one overtakes the other between batch sizes {} and {}".format(*border)
    )
    return run


def _batches(side: Side, sides: Sequence[Side]) -> str:
    if side.most is not None:
        return f"batches of up to {side.most}" if side.most > 1 else "batches of 1"
    return f"batches of {max((s.most or 0) for s in sides) + 1} and more"
