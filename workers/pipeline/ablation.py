"""What each part of the shipped engine gains and costs: the configurations with that part left out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from workers.artifacts import CHAINED
from workers.candidates import Candidate, Step
from workers.kernel import backends, stages


@dataclass(frozen=True)
class Part:
    """One part of a candidate, and the candidate without it. `without` is None where that cannot be built; `reason`
    says why then, and else what stands in its place."""

    name: str
    without: Candidate | None
    reason: str | None = None
    stage: str | None = None  # the graph step that this part is, for its details


def parts(
    picked: Candidate, others: Sequence[Candidate], defaults: dict[str, Any], baseline_backend: str
) -> list[Part]:
    """The parts of `picked`, in the order they are applied. `others`: the configurations that were built, for a
    stand-in where the backend is left out, and `baseline_backend` is in its place. `defaults`: runtime options of plain
    float32, of the backend of `alone(picked)`."""
    found = [p for i in range(len(picked.steps)) for p in _step_parts(picked, i)]
    found += _backend_part(picked, others, baseline_backend)
    one = alone(picked)
    for part in _runtime_parts(one, defaults):
        without = part.without if one is picked or part.without is None else part.without.linked(picked.backend)
        found.append(replace(part, without=without))
    return [replace(p, without=_renamed(p.without, i)) if p.without else p for i, p in enumerate(found)]


def alone(picked: Candidate) -> Candidate:
    """What each engine of a chain is; the candidate itself where it has one engine."""
    kind = backends().get(picked.backend)
    return picked.unlinked() if kind is not None and kind.engine_format == CHAINED else picked


def _step_parts(picked: Candidate, index: int) -> list[Part]:
    step = picked.steps[index]
    if step.group is not None:
        return _group_part(picked, index, step.group)
    stage = stages()[step.stage]
    kept = [*step.options.get("exclude_nodes", ())]
    told = stage.part(step.options)
    if told.instead is not None:
        return [Part(told.name, _with(picked, index, replace(step, options=told.instead)), stage=step.stage)]
    if not stage.rounds:
        return [Part(told.name, _with(picked, index, None), stage=step.stage)]
    found = [Part(told.name, _unrounded(picked, index), stage=step.stage)]
    if kept:
        everything = replace(step, options={**step.options, "exclude_nodes": []})
        name = f"{len(kept)} sensitive nodes kept in higher precision"
        found.append(Part(name, _with(picked, index, everything)))
    return found


def _group_part(picked: Candidate, index: int, group: str) -> list[Part]:
    """Of steps that go together, at the first of them."""
    if any(s.group == group for s in picked.steps[:index]):
        return []
    without = replace(picked, steps=tuple(s for s in picked.steps if s.group != group))
    return [Part(group, without, stage=picked.steps[index].stage)]


def _unrounded(picked: Candidate, index: int) -> Candidate:
    """Without the step that rounds, and without those that only serve it."""
    known = stages()
    steps = [s for i, s in enumerate(picked.steps) if i != index and not known[s.stage].serves_rounding]
    return replace(picked, steps=tuple(steps), lossless=False)


def _with(picked: Candidate, index: int, step: Step | None) -> Candidate:
    steps = [*picked.steps]
    steps[index : index + 1] = [step] if step is not None else []
    return replace(picked, steps=tuple(steps))


def _backend_part(picked: Candidate, others: Sequence[Candidate], baseline: str) -> list[Part]:
    """The backend left out: the baseline's on the same graph, or on its own graph of the same precision where this one
    is the backend's alone."""
    one = alone(picked)
    if one is not picked:
        return [Part("an engine of each model in place of one of the whole", one)]
    if picked.backend == baseline:
        return []
    name = f"{picked.backend} in place of {baseline}"
    theirs = [c for c in others if c.backend == baseline]
    same_steps = next((c for c in theirs if c.steps == picked.steps and not c.runtime), None)
    stand_in = same_steps or next((c for c in theirs if c.precision == picked.precision and not c.runtime), None)
    if stand_in is None:
        return [Part(name, None, f"no {picked.precision} configuration of {baseline} was built to compare with")]
    note = None if stand_in is same_steps else f"against {stand_in.name} on {baseline}, the nearest that it runs"
    return [Part(name, stand_in, note)]


def _runtime_parts(picked: Candidate, defaults: dict[str, Any]) -> list[Part]:
    precision = {k: v for k, v in picked.runtime.items() if "precision" in k and defaults.get(k, v) != v}
    tuned = {k: v for k, v in picked.runtime.items() if "precision" not in k and defaults.get(k) != v}
    found = []
    if precision:
        plain = {**picked.runtime, **{k: defaults[k] for k in precision}}
        what = ", ".join(str(v) for v in precision.values())
        found.append(Part(f"{what} arithmetic for what is not quantized", replace(picked, runtime=plain)))
    if tuned:
        kept = {k: v for k, v in picked.runtime.items() if k not in tuned}
        kept |= {k: defaults[k] for k in tuned if k in defaults}
        what = ", ".join(f"{k}={v}" for k, v in sorted(tuned.items()))
        found.append(Part(f"runtime options ({what})", replace(picked, runtime=kept)))
    return found


def _renamed(candidate: Candidate, index: int) -> Candidate:
    return replace(candidate, id=f"without-{index + 1}", name=f"{candidate.name} (one part left out)")
