"""The full method for every configuration: what the search is measured against. Pure."""

from __future__ import annotations

from workers.search import checking, choosing, making
from workers.search.draft import Draft
from workers.search.requests import Ahead, Answer, Judge
from workers.search.state import Phase


def add_variants(d: Draft) -> None:
    """Everybody's runtime options, once everybody is built."""
    for cid in [i for i, c in d.state.candidates.items() if c.built is not None]:
        for variant in d.variants(d[cid].plan):
            d.add(variant, of=cid)
    unbuilt = [i for i, c in d.state.candidates.items() if c.built is None and c.refused is None]
    making.begin(d, unbuilt, Phase.CHECKING_ALL)


def ask(d: Draft) -> Judge | None:
    """None where everybody was checked, and the sound ones are finalists."""
    due = _due(d)
    if due:
        return due[0]
    choosing.finish(d, d.alive())
    d.phase_ends("everything built and checked", len(d.state.candidates))
    return None


def ahead(d: Draft) -> list[Ahead]:
    return [Ahead(request, sure=True) for request in _due(d)]


def _due(d: Draft) -> list[Judge]:
    most, until = d.spec.validation.max_samples, d.deadlines.search_until
    return [Judge(d.subject(i), most, d.state.apart, until) for i in d.alive() if d[i].accuracy is None]


def take(d: Draft, request: Judge, answer: Answer) -> None:
    cid = request.subject.id
    if "undefined" in answer:
        d.state.stopped = answer["undefined"]
        return
    if d.refused_by(cid, answer, "check"):
        return
    d.put(cid, accuracy=answer["accuracy"], asked=answer["asked"], most_asked=request.samples)
    if not answer["sound"]:
        d.drop(cid, "check", checking.broken(d[cid].loss))
