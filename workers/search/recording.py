"""Searches as JSON lines: what was asked, what was told, and when; enough to run the policy again, and nothing else.

The first line holds the job's facts and candidates, the last one the finalists. Of figures and accuracies only what the
policy looks at is kept.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from app.domain.spec import OptimizationSpec
from workers.candidates import Candidate
from workers.search import requests
from workers.search.policy import Policy
from workers.search.requests import Answer, Done, Request
from workers.search.state import Deadlines, Facts, SearchState

log = structlog.get_logger(__name__)

_AT_A_BATCH = ("p50_ms", "mean_ms", "min_ms")
_OF_ACCURACY = ("loss_percent", "loss_ci", "samples", "complete", "source", "broken", "outputs")


class Recorder:
    """`write`: takes one line."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._varied: set[str] = set()
        self._ratio = "speedup"

    def begins(self, facts: Facts, candidates: Iterable[Candidate], deadlines: Deadlines, now: float) -> None:
        self._ratio = "speedup" if facts.spec.objective == "latency" else "throughput_ratio"
        training = [dataclasses.asdict(step) for step in facts.training]
        instead = {stage: dataclasses.asdict(step) for stage, step in facts.training_instead.items()}
        told = {**vars(facts), "spec": facts.spec.model_dump(mode="json"), "training": training}
        told |= {"training_instead": instead}
        plans = [dataclasses.asdict(c) for c in candidates]
        self._line({"facts": told, "candidates": plans, "deadlines": dataclasses.asdict(deadlines), "now": now})

    def has_variants(self, plan: Candidate, variants: Sequence[Candidate]) -> None:
        if plan.id not in self._varied:
            self._varied.add(plan.id)
            self._line({"variants_of": plan.id, "variants": [dataclasses.asdict(v) for v in variants]})

    def final_takes(self, seconds: float) -> None:
        self._line({"final_seconds": seconds})

    def told(self, request: Request, answer: Answer, asked: float, told: float) -> None:
        """`asked`, `told`: seconds of the budget."""
        self._line({"asked": asked, "request": requests.to_json(request), "told": told, "answer": self._seen(answer)})

    def ends(self, done: Done, now: float) -> None:
        self._line({"asked": now, "done": dataclasses.asdict(done)})

    def _line(self, entry: Mapping[str, Any]) -> None:
        self._write(json.dumps(entry) + "\n")

    def _seen(self, answer: Answer) -> Answer:
        found = dict(answer)
        if found.get("accuracy"):
            found["accuracy"] = {k: v for k, v in found["accuracy"].items() if k in _OF_ACCURACY}
        if found.get("engines"):
            found["engines"] = {name: self._figures(figures) for name, figures in found["engines"].items()}
        return found

    def _figures(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        if "failed" in figures:
            return {"failed": figures["failed"]}
        batches, seen = figures.get("batches", {}).items(), (self._ratio, *_AT_A_BATCH)
        return {"batches": {size: {k: at[k] for k in seen if k in at} for size, at in batches}}


@dataclass
class Recording:
    """A search that was recorded. `steps`: (asked, request, told, answer)."""

    facts: Facts
    candidates: list[Candidate]
    deadlines: Deadlines
    begun: float
    variants: dict[str, list[Candidate]] = field(default_factory=dict)
    final_seconds: float = 0.0
    steps: list[tuple[float, Request, float, Answer]] = field(default_factory=list)
    done: Done | None = None
    ended: float = 0.0

    @classmethod
    def read(cls, lines: Iterable[str]) -> Recording:
        entries = map(json.loads, lines)
        first = next(entries)
        told = first["facts"]
        spec = OptimizationSpec.model_validate(told["spec"])
        steps = tuple(map(requests.step_from_json, told.get("training", ())))
        instead = {s: requests.step_from_json(step) for s, step in told.get("training_instead", {}).items()}
        facts = Facts(**{**told, "spec": spec, "training": steps, "training_instead": instead})
        plans = [requests.candidate_from_json(c) for c in first["candidates"]]
        found = cls(facts, plans, Deadlines(**first["deadlines"]), first["now"])
        for entry in entries:
            found._add(entry)
        return found

    def _add(self, entry: Mapping[str, Any]) -> None:
        if "variants_of" in entry:
            self.variants[entry["variants_of"]] = [requests.candidate_from_json(v) for v in entry["variants"]]
        elif "final_seconds" in entry:
            self.final_seconds = entry["final_seconds"]
        elif "done" in entry:
            done = entry["done"]
            self.done = Done(**{**done, "finalists": tuple(done["finalists"])})
            self.ended = entry["asked"]
        else:
            request = requests.from_json(entry["request"])
            self.steps.append((entry["asked"], request, entry["told"], entry["answer"]))

    def policy(self) -> Policy:
        """As the search had it: it may only be asked what was asked there."""
        return Policy(self.facts, lambda plan: self.variants[plan.id], lambda _: self.final_seconds)

    def replay(self) -> Iterator[tuple[Request | Any, Request | Done | None, SearchState]]:
        """What the policy asks now, beside what was asked then, step by step, and the state it asks in."""
        policy = self.policy()
        state = policy.begin(self.candidates, self.deadlines, self.begun)
        for asked, request, told, answer in self.steps:
            state, now = policy.advance(state, asked)
            yield now, request, state
            state = policy.take(state, request, answer, told)
        state, now = policy.advance(state, self.ended)
        yield now, self.done, state


def recorder(folder: Path | None, name: str) -> Recorder | None:
    """Into `folder`, where one is given; what cannot be written there is no reason for a job to fail."""
    if folder is None:
        return None

    def write(line: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            log.warning("search_not_recorded", name=name, reason=str(error))

    return Recorder(write)
