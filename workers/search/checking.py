"""The accuracy of a candidate: on a few samples first; on all where those cannot tell and the time holds it; then
whether it answers at other shapes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.measure.shares import judging
from workers.pipeline.checks import FEWEST, without_data
from workers.pipeline.shape_rules import unfit
from workers.search import halving, limits
from workers.search.draft import Draft
from workers.search.requests import Answer, Judge, TryShapes


def expect(d: Draft, sample_ms: float) -> None:
    """What the original takes for a sample. Where judging all of them costs next to nothing, they judge at once: the
    finalists are judged on all in any case."""
    most, facts = d.spec.validation.max_samples, d.facts
    count = min(judging(facts.judging // (2 if facts.same_data else 1), "select") if facts.judging else 0, most)
    limit = min(limits.CHEAP * d.deadlines.seconds, limits.CHEAP_OF_LEFT * d.search_left)
    if count and sample_ms > 0 and limits.CALL_S + count * sample_ms / 1e3 <= limit:
        d.state.few = most


def ask(d: Draft, cid: str) -> Judge | TryShapes | None:
    """The next check that is due; None where `kept` says what there is to know."""
    found, most = d[cid], d.spec.validation.max_samples
    if found.refused is not None or found.kept is not None:
        return None
    if found.accuracy is None or not found.settled:
        samples = min(d.state.few, most) if found.accuracy is None else most
        if found.accuracy is None or _worth_all(d, cid):
            return Judge(d.subject(cid), samples, d.state.apart, d.deadlines.search_until)
        d.put(cid, settled=True)
    if not found.shapes_asked and not _keeps(d, cid):
        d.put(cid, kept=False)
        return None
    if d.facts.free_axes and d.state.probes and not found.shapes_asked and not d.over(d.deadlines.search_until):
        return TryShapes(d.subject(cid), d.deadlines.search_until)
    d.put(cid, kept=True)
    return None


def take(d: Draft, request: Judge | TryShapes, answer: Answer) -> None:
    cid = request.subject.id
    if isinstance(request, TryShapes):
        _take_shapes(d, cid, answer)
        return
    most = d.spec.validation.max_samples
    if "undefined" in answer:
        # So few of them are all of one kind; all of them may not be. If those that the search may look at are too few,
        # it looks at all there are, and then nothing is left that could prove anything.
        if request.samples >= most and not d.state.apart:
            d.state.stopped = answer["undefined"]
        d.state.apart &= request.samples < most
        d.state.few = most
        return
    if d.refused_by(cid, answer, "check"):
        return
    before = d[cid].most_asked
    d.put(
        cid,
        accuracy=answer["accuracy"],
        asked=answer["asked"],
        most_asked=max(before, request.samples),
        all_seconds=answer["all_seconds"],
    )
    if not answer["sound"]:
        d.drop(cid, "check", broken(d[cid].loss))
        return
    told = d[cid].loss
    d.note(cid, "check", "checked", loss_percent=told.get("loss_percent"), samples=told.get("samples"))
    if before and told.get("samples", most) <= limits.AT_ONCE:
        d.state.few = most  # too few for one are too few for the next, and all are not many


def _worth_all(d: Draft, cid: str) -> bool:
    """One flip among few samples is no loss that mending could find, and none among few is no proof."""
    found, most = d[cid], d.spec.validation.max_samples
    if found.most_asked >= most or d.complete(cid):
        return False
    if found.loss.get("source") == "synthetic" or halving.loses_too_much(d.spec, found.loss) or d.beyond_doubt(cid):
        return False
    if found.all_seconds <= limits.FULL_SHARE * d.search_left and not d.over(d.deadlines.search_until):
        return True
    why = f"that would take {found.all_seconds:.0f} s, too long for the search"
    d.note(cid, "check", "not judged on all samples", why)
    return False


def _keeps(d: Draft, cid: str) -> bool:
    """The limit, as far as the samples that were judged can tell."""
    found = d[cid]
    if found.loss.get("source") == "synthetic" and not found.plan.lossless:
        d.note(cid, "check", "cannot ship", without_data(found.plan.narrows))
        return False
    samples = found.loss.get("samples", 0)
    if samples < FEWEST and not found.loss.get("complete", True) and not found.plan.lossless:
        d.note(cid, "check", "cannot tell", f"the time left allowed {samples} samples")
        return False
    if d.complete(cid):
        return halving.may_keep(d.spec, found.loss)  # those that confirm may tell otherwise
    return not halving.loses_too_much(d.spec, found.loss)


def _take_shapes(d: Draft, cid: str, answer: Answer) -> None:
    d.state.probes &= bool(answer["probes"])
    d.put(cid, shapes_asked=True)
    if d.refused_by(cid, answer, "shapes") or answer["shapes"] is None:
        return
    d.put(cid, shapes=answer["shapes"])
    wrong = unfit(answer["shapes"], d[cid].accuracy, d.spec.validation.max_accuracy_loss_percent)
    if wrong:
        d.drop(cid, "check", "; ".join(wrong))


def keeps(d: Draft, cid: str) -> bool:
    """Whether it was checked, and may ship as far as that can tell."""
    return d[cid].refused is None and d[cid].kept is True


def why_not(d: Draft, cid: str) -> str:
    """For the report: why a checked candidate cannot ship."""
    found = d[cid]
    if found.loss.get("source") == "synthetic":
        return without_data(found.plan.narrows)
    loss, samples = found.loss.get("loss_percent"), found.loss.get("samples")
    if loss is not None and not halving.over_limit(d.spec, found.loss):
        return f"the time left allowed {samples} samples: too few to show that it keeps the accuracy"
    shown = "an unknown part" if loss is None else f"{loss:.2f} %"
    limit = d.spec.validation.max_accuracy_loss_percent
    return f"accuracy loss {shown} on {samples} samples, over the limit of {limit} %"


def broken(accuracy: Mapping[str, Any]) -> str:
    found = accuracy.get("broken") or {}
    return f"output broken: {found.get('detail', 'it could not be checked')}"
