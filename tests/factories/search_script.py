"""A search over scripted measurements: what each candidate would show is a table, and a clock says what it took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from app.domain.failures import StageFailure
from app.domain.spec import OptimizationSpec
from workers import recipes
from workers.candidates import Candidate, Case
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.planner import planned

BATCHES = ("1", "8")


@dataclass
class Truth:
    """What a candidate would show: gain at batch 1 and 8, loss in percent, and what it fails with."""

    ratio: float = 1.0
    at_8: float | None = None
    loss: float = 0.0
    full_loss: float | None = None  # on all samples, where it is another one
    make_fails: StageFailure | None = None
    broken: str | None = None
    cost_s: float = 0.0
    size_bytes: int = 1000


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Script:
    """Stands in for the stages: answers from a table, and remembers what was asked."""

    truths: Mapping[str, Truth]
    clock: Clock
    source: str = "dataset"
    nodes: Sequence[str] = ()
    timing_s: float = 0.0  # of a short timing, per engine
    check_s: float = 0.0
    judging: int = 0  # samples there are
    keeping_is_cheap: bool = False
    twins: Mapping[str, str] = field(default_factory=dict)  # candidates whose engine is another one's, byte for byte
    call_ms: float = 0.0  # of the original, per sample; of slow ones there is no median in a short timing
    batch: int | str = "batch"  # of the model
    searched_until: float = 0.0
    timing_fails: Callable[[Sequence[CandidateRun]], StageFailure | None] | None = None
    graphs: Mapping[str, str] = field(default_factory=dict)  # key of a candidate's graph, where it matters
    calls: list[tuple[str, str]] = field(default_factory=list)
    full: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spec = case().spec
        calibration = SimpleNamespace(digest="c")
        self.data = SimpleNamespace(
            calibration=calibration,
            validation=calibration,
            same=False,
            shapes=None,
            judging=self.judging,
            calibrating=300,
            training_samples=0,
        )
        outputs = {"model": SimpleNamespace(size_bytes=1000)}
        x = {"name": "x", "dtype": "float32", "shape": [self.batch, 4]}
        self.export = SimpleNamespace(key="export", outputs=outputs, data={"inputs": [x]})

    def truth(self, cid: str) -> Truth:
        """Of the candidate, or of what it is a variant of; keeping nodes mends it a bit each."""
        if cid in self.truths:
            return self.truths[cid]
        return self.truth(cid.rsplit(".", 1)[0])

    def make(self, run: CandidateRun, until: float) -> bool:
        self.calls.append(("make", run.plan.id))
        truth = self.truth(run.plan.id)
        self.clock.now += truth.cost_s
        if truth.make_fails is not None:
            run.failure = truth.make_fails
            run.drop("make", truth.make_fails.detail)
            return False
        key = self.graphs.get(run.plan.id, f"graph of {run.plan.id}")
        outputs = {"model": SimpleNamespace(size_bytes=1000)}
        graph: Any = SimpleNamespace(key=key, outputs=outputs, seconds=truth.cost_s / 3)
        run.graph = graph
        run.steps = [graph, graph, graph]
        digest = self.twins.get(run.plan.id, run.plan.id)
        engine = SimpleNamespace(size_bytes=truth.size_bytes, digest=digest)
        run.build = SimpleNamespace(data={"runtime": {}}, outputs={"engine": engine})  # type: ignore[assignment]
        return True

    def check(self, run: CandidateRun, samples: int, until: float) -> bool:
        self.calls.append(("check", run.plan.id))
        self.clock.now += self.check_s
        if samples > 96:
            self.full.append(run.plan.id)
        truth = self.truth(run.plan.id)
        broken = {"code": "output_nan", "output": "y", "detail": truth.broken} if truth.broken else None
        run.validate = SimpleNamespace(options={"max_samples": samples}, data={})  # type: ignore[assignment]
        known = truth.loss if samples <= 96 or truth.full_loss is None else truth.full_loss
        loss = None if broken else known
        wide = 0.1 if truth.full_loss is None else 3.0 if samples <= 96 else 0.3
        interval = None if broken else [known - wide, known + wide]
        run.tried.accuracy = {
            "loss_percent": loss,
            "loss_ci": interval,
            "samples": samples,
            "source": self.source,
            "broken": broken,
        }
        return not broken

    def expected_check_seconds(self, run: CandidateRun, samples: int) -> float:
        return self.check_s * samples / 96

    def time(self, runs: Sequence[CandidateRun], until: float, **options: Any) -> Any:
        self.calls += [("time", r.plan.id) for r in runs]
        self.clock.now += self.timing_s * (len(runs) + 2)
        if self.timing_fails is not None and (failure := self.timing_fails(runs)):
            raise failure
        batches = [str(b) for b in options.get("batch_sizes") or BATCHES]
        engines: dict[str, Any] = {r.plan.id: self._figures(r.plan.id, batches) for r in runs}
        engines["baseline"] = {"batches": {b: self._original(self.call_ms * int(b)) for b in batches}}
        return SimpleNamespace(data={"engines": engines, "batch_sizes": [*map(int, batches)]}, made={})

    def _original(self, ms: float) -> dict[str, Any]:
        return {"p50_ms": None, "mean_ms": ms, "min_ms": 0.9 * ms}

    def _figures(self, cid: str, batches: Sequence[str]) -> dict[str, Any]:
        truth = self.truth(cid)
        at = {"1": truth.ratio, "8": truth.at_8 if truth.at_8 is not None else truth.ratio}
        return {
            "batches": {
                b: {
                    "speedup": {"ratio": at[b], "low": 0.97 * at[b], "high": 1.03 * at[b]},
                    **({"mean_ms": (ms := self.call_ms * int(b) / at[b]), "min_ms": 0.9 * ms} if self.call_ms else {}),
                }
                for b in batches
            }
        }

    def memory_bytes(self) -> float:
        return 1e12

    def ranges_of(self, step: Any, graph: Any) -> None:
        return None

    def quantized_before(self, step: Any, graph: Any) -> bool:
        return self.keeping_is_cheap

    def call(self, stage: str, *_: Any, **__: Any) -> Any:
        self.calls.append(("stage", stage))
        nodes = [{"name": n, "op_type": "MatMul", "error": 1.0 / (i + 1)} for i, n in enumerate(self.nodes)]
        return SimpleNamespace(data={"nodes": nodes, "metric": "kl"})

    def asked(self, what: str) -> list[str]:
        return [cid for kind, cid in self.calls if kind == what]


def case(**spec: Any) -> Case:
    body = {"model_id": "mdl_x", "calibration": {"dataset_id": "dst_x"}, "benchmark": {"batch_sizes": [1, 8]}}
    body |= {"engines_per_bundle": 1, **spec}
    return Case(OptimizationSpec.model_validate(body), {"MatMul": 8}, "transformer", isa=["avx512_vnni"], cores=2,
                has_calibration=True)  # fmt: skip


def candidate(cid: str, *, lossless: bool = False, int8: bool = False) -> Candidate:
    known = case()
    steps = (recipes.simplify(), recipes.static_int8(known, ["MatMul"])) if int8 else (recipes.simplify(),)
    return planned(Candidate(cid, cid, "onnxruntime", "int8" if int8 else "fp32", steps, lossless=lossless))
