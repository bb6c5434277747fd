"""What is checked of an engine against the job's limits: accuracy, p99 and what else is limited. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.domain.spec import OptimizationSpec
from workers.measure.shares import data_set_for

LOSS = "accuracy_loss_percent"
# Percent. The same arithmetic in another order moves floats by so much, and no more.
SAME_ARITHMETIC = 0.01
FEWEST = 32  # samples, below which a check that ran out of time says nothing


@dataclass(frozen=True)
class Check:
    """One verdict: the value that was measured (None where it could not be), its limit, and whether it holds.

    `bound`: what cannot be excluded at `confidence`, from so many `samples`; `proven`: whether it lies within the limit
    (None where nothing is inferred from samples); `samples_needed`: that the data set needs to show it (None: no number
    would, or it is shown). `by_bound`: the bound has to keep the limit, not only the value."""

    name: str
    value: float | None
    limit: float | None
    passed: bool
    reason: str | None = None
    proven: bool | None = None
    bound: float | None = None
    confidence: float | None = None
    samples: int | None = None
    samples_needed: int | None = None
    by_bound: bool = False
    at_least: bool = False

    def to_json(self) -> dict[str, Any]:
        shown = ("name", "value", "limit", "passed", "reason", "proven", "bound", "confidence", "samples")
        return {**{k: getattr(self, k) for k in shown}, "samples_needed": self.samples_needed}

    @property
    def judged(self) -> float | None:
        """The figure that the limit is held against."""
        return self.bound if self.by_bound else self.value

    @property
    def miss(self) -> float:
        """How far it is off its limit, relative to it; 0 where it holds, infinite where it is not known."""
        if self.passed:
            return 0.0
        if self.judged is None or not self.limit:
            return float("inf")
        return abs(self.judged - self.limit) / abs(self.limit)


def looks(finalists: Sequence[tuple[bool, Mapping[str, Any] | None]]) -> int:
    """How often the samples that confirm are looked at for a verdict that rests on them: once for every finalist
    (lossless, what the search knew of its accuracy), but for those whose arithmetic is proof enough."""
    return max(1, sum(not _same_arithmetic(lossless, accuracy) for lossless, accuracy in finalists))


def confidence_of_a_look(spec: OptimizationSpec, count: int) -> float:
    """So sure that all looks together err as seldom as `validation.confidence` says (Bonferroni)."""
    return 1 - (1 - spec.validation.confidence) / count


def same_bytes() -> Check:
    """Of the original itself."""
    return Check(LOSS, 0.0, None, True, "proven: the shipped bytes are the original's", proven=True, bound=0.0)


def without_data(narrows: str | None) -> str:
    """Why what is not lossless cannot ship. `narrows`: why its arithmetic is not the original's, where it is not that
    of its precision."""
    reason = "no validation data: a change of precision cannot be shown to keep its accuracy"
    return f"{reason} ({narrows})" if narrows else reason


def accuracy_checks(
    spec: OptimizationSpec, accuracy: Mapping[str, Any] | None, *, lossless: bool, narrows: str | None = None
) -> list[Check]:
    """Fails closed: no figure, no pass. Within the limit by its estimate it passes; proven it is where the bound on the
    samples that confirm keeps the limit, too, or by its arithmetic. `strict`: what is not proven does not pass.
    `narrows`: why its arithmetic is not the original's."""
    limit = spec.validation.max_accuracy_loss_percent
    if accuracy is None:
        return [Check(LOSS, None, limit, False, "its accuracy was not measured")]
    broken = accuracy.get("broken")
    finite = Check("finite_outputs", None, None, not broken, f"output broken: {broken['detail']}" if broken else None)
    if broken:
        return [finite]
    if accuracy.get("source") == "synthetic" and not lossless:
        return [finite, Check(LOSS, accuracy.get("loss_percent"), limit, False, without_data(narrows), proven=False)]
    return [finite, _loss_check(spec, accuracy, lossless)]


def _loss_check(spec: OptimizationSpec, accuracy: Mapping[str, Any], lossless: bool) -> Check:
    limit, loss = spec.validation.max_accuracy_loss_percent, accuracy.get("loss_percent")
    samples, bound = accuracy.get("samples"), accuracy.get("bound_percent")
    if loss is None or loss > limit:
        shown = "unknown" if loss is None else f"{loss:.3f} %"
        reason = f"accuracy loss {shown}, over the limit of {limit} %"
        return Check(LOSS, loss, limit, False, reason, False, bound, spec.validation.confidence, samples)
    whole = bool(accuracy.get("complete", True))
    if not whole and (samples or 0) < FEWEST and not lossless:
        reason = f"the time left allowed {samples} samples: too few to show that it keeps the accuracy"
        return Check(LOSS, loss, limit, False, reason, False, None, spec.validation.confidence, samples)
    if whole and _same_arithmetic(lossless, accuracy):
        reason = f"proven by its arithmetic, which is the original's; it differs by {loss:.2g} % here"
        return Check(LOSS, loss, limit, True, reason, True, None, None, samples)
    confirmed = whole and accuracy.get("part") == "confirm"
    if confirmed and bound is not None and bound <= limit:
        reason = f"proven: at most {bound:.3g} % at {_percent(spec.validation.confidence)}, on {samples} samples"
        return Check(LOSS, loss, limit, True, reason, True, bound, spec.validation.confidence, samples)
    needed = _needed(accuracy) if whole else None
    reason = f"unproven: {_why_unproven(spec, accuracy, needed)}"
    strict = spec.validation.strict
    if strict:
        reason = f"accuracy {reason}"
    return Check(
        LOSS,
        loss,
        limit,
        not strict,
        reason,
        False,
        bound,
        spec.validation.confidence,
        samples,
        needed,
        by_bound=strict,
    )


def _same_arithmetic(lossless: bool, accuracy: Mapping[str, Any] | None) -> bool:
    loss = (accuracy or {}).get("loss_percent")
    return lossless and loss is not None and loss <= SAME_ARITHMETIC


def _needed(accuracy: Mapping[str, Any]) -> int | None:
    """Samples of the data set: a part of them confirms, and where it calibrates as well half of them judge."""
    confirming = accuracy.get("samples_needed")
    return None if confirming is None else data_set_for(confirming) * (2 if accuracy.get("shared") else 1)


def _why_unproven(spec: OptimizationSpec, accuracy: Mapping[str, Any], needed: int | None) -> str:
    samples, bound = accuracy.get("samples"), accuracy.get("bound_percent")
    limit, sure = spec.validation.max_accuracy_loss_percent, _percent(spec.validation.confidence)
    if accuracy.get("source") == "synthetic":
        return "random inputs show a difference that the same arithmetic does not make; give validation data"
    if not accuracy.get("complete", True):
        return f"the time ran out after {samples} samples; give a larger budget_seconds"
    if accuracy.get("part") == "select":
        return "the time left did not hold a look at the samples that confirm; give a larger budget_seconds"
    open_to = f"a loss of up to {bound:.3g} %" if bound is not None else "no loss at all"
    of = f"{samples} samples" if samples != 1 else "one sample"
    why = f"on {of} {open_to} can be excluded at {sure}"
    if bound is not None:
        why = f"on {of} {open_to} cannot be excluded at {sure}"
    if accuracy.get("part") != "confirm":
        return f"{why}, and the search looked at the same ones: there are too few to keep some apart"
    if needed is None:
        return f"{why}, and more samples like these would not show a limit of {limit} %"
    confirming = accuracy.get("samples_needed") or 0
    more = confirming > spec.validation.max_samples
    raised = f", with `validation.max_samples` of {confirming}" if more else ""
    return f"{why}; about {needed} validation samples would show a limit of {limit} %{raised}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def p99_check(at: Mapping[str, Any], limit: float | None) -> Check:
    """By the order statistic that bounds the percentile, not by the percentile of these samples."""
    value, bound = at.get("p99_ms"), at.get("p99_bound_ms")
    why = at.get("reasons", {}).get("p99_ms") or at.get("reasons", {}).get("p99_bound_ms") or "p99 was not measured"
    name, samples = "p99_latency_ms", at.get("samples")
    if limit is None:
        return Check(name, value, None, True, why if value is None else None, None, bound, 0.95, samples)
    if bound is None:
        return Check(name, value, limit, False, f"{name}: {why}", False, None, 0.95, samples, by_bound=True)
    passed = bound <= limit
    shown = "unknown" if value is None else f"{value:.3f}"
    reason = None if passed else f"{name} {shown}, at most {bound:.3f} at 95 %: over the limit of {limit}"
    return Check(name, value, limit, passed, reason, passed, bound, 0.95, samples, by_bound=True)


def at_most(name: str, value: float | None, limit: float | None, missing: str) -> Check:
    """Where nobody set a limit the value is shown and passes."""
    if limit is None:
        return Check(name, value, None, True, missing if value is None else None)
    if value is None:
        return Check(name, None, limit, False, f"{name}: {missing}")
    passed = value <= limit
    return Check(name, value, limit, passed, None if passed else f"{name} {value:.3f} over the limit of {limit}")
