"""A world that answers a search's requests from a table, with a clock of its own: nothing is run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.candidates import Candidate, Step
from workers.pipeline.planner import planned
from workers.search import requests
from workers.search.policy import Policy
from workers.search.recording import Recorder
from workers.search.requests import Done, Judge, Make, Rank, Request, Stopped, Time, TryShapes
from workers.search.state import Deadlines, Facts, SearchState


@dataclass(frozen=True)
class Truth:
    """What is true of a candidate: gain at either batch size, loss in percent, bytes, seconds to make it; `fails`: why
    it cannot be made; `broken`: its outputs are; `wrong`: it answers otherwise at another shape. `mends`: what is left
    of its loss for each node in higher precision."""

    ratio: float = 1.5
    at_8: float = 1.5
    loss: float = 0.0
    size: int = 1000
    seconds: float = 1.0
    fails: bool = False
    broken: bool = False
    wrong: bool = False
    mends: float = 0.7
    engine: str | None = None  # another one's, byte for byte


@dataclass
class World:
    """Answers, and lets the time pass. `largest`: so many engines memory holds in one timing. `asked`: all requests, as
    JSON."""

    truths: Mapping[str, Truth]
    spec: OptimizationSpec
    seconds: float = 900.0
    call_ms: float = 1.0
    timing_s: float = 1.0
    check_s: float = 1.0
    largest: int = 100
    nodes: int = 16
    samples: int = 600
    free_axes: bool = False
    probes: bool = True
    undefined: Callable[[Judge], bool] = lambda _: False
    variants: tuple[tuple[str, float], ...] = (("t1", 1.1), ("nospin", 0.9))
    now: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    states: list[SearchState] = field(default_factory=list)

    def facts(self) -> Facts:
        return Facts(
            spec=self.spec,
            products=True,
            has_calibration=True,
            has_data=True,
            judging=3 * self.samples,
            calibrating=300,
            same_data=False,
            original_bytes=2000,
            fixed_batch=None,
            free_axes=self.free_axes,
            memory_bytes=1e9,
        )

    def deadlines(self) -> Deadlines:
        end = self.seconds - 2.0
        return Deadlines(self.seconds, end, make_until=0.36 * end, search_until=0.6 * end)

    def candidates(self) -> list[Candidate]:
        return [candidate(cid) for cid in self.truths if "." not in cid]

    def policy(self) -> Policy:
        def variants(plan: Candidate) -> list[Candidate]:
            return [plan.variant(suffix, suffix, option=suffix) for suffix, _ in self.variants]

        return Policy(self.facts(), variants, lambda calls: 5.0 * (len(calls) + 1))

    def run(self) -> tuple[Done | Stopped, SearchState]:
        policy = self.policy()
        state = policy.begin(self.candidates(), self.deadlines(), self.now)
        for _ in range(2000):
            state, request = policy.advance(state, self.now)
            self.states.append(state)
            if isinstance(request, Done | Stopped):
                return request, state
            assert requests.from_json(json.loads(json.dumps(requests.to_json(request)))) is not None
            self.asked.append({**requests.to_json(request), "now": self.now})
            state = policy.take(state, request, self.answer(request), self.now)
        raise AssertionError("the search does not end")

    def recorded(self) -> list[str]:
        """The lines that a driver would write of it."""
        lines: list[str] = []
        kept, policy = Recorder(lines.append), self.policy()
        of_policy, final = policy.variants, policy.final_seconds

        def variants(plan: Candidate) -> list[Candidate]:
            found = [*of_policy(plan)]
            kept.has_variants(plan, found)
            return found

        def final_seconds(calls: Any) -> float:
            kept.final_takes(final(calls))
            return final(calls)

        policy.variants, policy.final_seconds = variants, final_seconds
        kept.begins(self.facts(), self.candidates(), self.deadlines(), self.now)
        state = policy.begin(self.candidates(), self.deadlines(), self.now)
        while True:
            asked = self.now
            state, request = policy.advance(state, asked)
            if isinstance(request, Done):
                kept.ends(request, asked)
                return lines
            assert not isinstance(request, Stopped)
            answer = self.answer(request)
            kept.told(request, answer, asked, self.now)
            state = policy.take(state, request, answer, self.now)

    def answer(self, request: Request) -> dict[str, Any]:
        match request:
            case Make():
                found = self._make(request)
            case Judge():
                found = self._judge(request)
            case Time():
                found = self._time(request)
            case TryShapes():
                found = self._shapes(request)
            case Rank():
                self.now += self.check_s
                found = {"nodes": [{"name": f"n{i}", "error": 1.0 / (i + 1)} for i in range(self.nodes)]}
        return dict(json.loads(json.dumps(found)))

    def truth(self, cid: str) -> Truth:
        return self.truths[cid.split(".", maxsplit=1)[0]]

    def loss(self, plan: Candidate) -> float:
        kept = sum(len(s.options.get("exclude_nodes", ())) for s in plan.steps)
        return self.truth(plan.id).loss * self.truth(plan.id).mends ** kept

    def _make(self, request: Make) -> dict[str, Any]:
        plan, truth = request.subject.candidate, self.truth(request.subject.id)
        if not plan.runtime:  # else the engine is there
            self.now += truth.seconds
        if truth.fails:
            return {"failed": "unsupported op Foo", "failure": {"code": "load_failed", "detail": "unsupported op Foo"}}
        steps = json.dumps([[s.stage, s.options] for s in plan.steps], sort_keys=True)
        return {
            "built": {
                "engine": truth.engine or f"{plan.id.split('.')[0]} {steps}",
                "size_bytes": truth.size,
                "graph": f"{plan.id.split('.')[0]} {steps}",
                "runtime": dict(plan.runtime),
                "seconds": [truth.seconds / 3] * 3,
                "reuses": False,
            }
        }

    def _judge(self, request: Judge) -> dict[str, Any]:
        plan, truth = request.subject.candidate, self.truth(request.subject.id)
        count = min(request.samples, self.samples)
        self.now += self.check_s * count / 96
        if self.undefined(request):
            return {"undefined": {"code": "metric_undefined", "detail": "one class only", "kind": "data"}}
        loss, wide = self.loss(plan), 10.0 / count**0.5
        accuracy = {"loss_percent": loss, "loss_ci": [max(loss - wide, 0.0), loss + wide], "samples": count}
        broken = {"detail": "NaN in y"} if truth.broken else None
        told = {**accuracy, "source": "dataset", "broken": broken, "complete": True}
        all_seconds = self.check_s * self.samples / 96
        return {"accuracy": told, "asked": request.samples, "sound": not truth.broken, "all_seconds": all_seconds}

    def _time(self, request: Time) -> dict[str, Any]:
        if len(request.subjects) > self.largest:
            self.now += self.timing_s
            return {"failure": {"code": "out_of_memory", "detail": "too many"}}
        sizes = request.batch_sizes or tuple(self.spec.benchmark.batch_sizes)
        self.now += (self.timing_s + request.seconds) * (len(request.subjects) + 1) * len(sizes)
        if self.now > request.until + 0.05 * self.seconds:
            self.now = request.until + 0.05 * self.seconds
            return {"failure": {"code": "timed_out", "detail": "the time was over"}}
        engines = {s.id: self._figures(s.candidate, sizes) for s in request.subjects}
        original = {"batches": {str(b): self._at(1.0, b) for b in sizes}}
        return {"engines": {"baseline": original, **engines}, "batch_sizes": list(sizes), "at": "2026-01-01"}

    def _figures(self, plan: Candidate, sizes: tuple[int, ...]) -> dict[str, Any]:
        truth, kept = self.truth(plan.id), sum(len(s.options.get("exclude_nodes", ())) for s in plan.steps)
        factor = dict(self.variants).get(plan.id.rsplit(".", 1)[-1], 1.0) * (1 - 0.01 * kept)
        # Between the two as far as the logarithm of the size says.
        gains = {b: truth.ratio * (truth.at_8 / truth.ratio) ** (math.log2(b) / 3) * factor for b in sizes}
        return {"batches": {str(b): self._at(gain, b) for b, gain in gains.items()}}

    def _at(self, gain: float, batch: int) -> dict[str, Any]:
        around = {"ratio": gain, "low": 0.97 * gain, "high": 1.03 * gain}
        ms = self.call_ms * batch / gain
        return {"speedup": around, "throughput_ratio": around, "p50_ms": ms, "mean_ms": ms, "min_ms": 0.9 * ms}

    def _shapes(self, request: TryShapes) -> dict[str, Any]:
        self.now += self.check_s
        if not self.probes:
            return {"shapes": None, "probes": False}
        wrong = {"longest first": "boom"} if self.truth(request.subject.id).wrong else {}
        at = {"label": "short", "dims": {"x": [1, 2]}, "sizes": {}, "in_use": True, "failed": wrong, "outputs": {}}
        return {"shapes": {"shapes": [at]}, "probes": True}


def candidate(cid: str) -> Candidate:
    """`int8…` is quantized with calibration, `fp32…` lossless."""
    steps = [Step("simplify", {})]
    if cid.startswith("int8"):
        options = {"recipe": "static_int8", "method": "minmax", "max_samples": 100, "exclude_nodes": []}
        steps.append(Step("quantize", options, ("calibration",)))
    precision = "int8" if cid.startswith("int8") else cid.split("-", maxsplit=1)[0]
    return planned(Candidate(cid, cid, "onnxruntime", precision, tuple(steps), lossless=cid.startswith("fp32")))
