"""What is told of a search to who watches it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.factories.search_world import candidate
from workers.search.halving import Speed
from workers.search.standings import Standings
from workers.search.state import Built, CandidateState, Deadlines, Phase, SearchState


def _state(*found: CandidateState) -> SearchState:
    return SearchState({c.plan.id: c for c in found}, Deadlines(60, 50, 20, 30), Phase.MAKING, 32)


def test_only_what_changed_is_told_and_who_leads() -> None:
    a, b = CandidateState(candidate("a")), CandidateState(candidate("b"))
    standings = Standings()
    first: Any = standings.news(_state(a, b))
    assert [c["standing"] for c in first["candidates"]] == ["proposed", "proposed"]
    assert first["leader"] is None
    assert standings.news(_state(a, b)) is None
    built = Built("e", 1, "g", {}, (1.0,))
    fast, slow = replace(a, built=built, speed=Speed(2.0, 1.9, 2.1)), replace(b, built=built, speed=Speed(0.9, 0.8, 1))
    news: Any = standings.news(_state(fast, slow))
    assert news["leader"] == "a"
    assert news["candidates"][0]["speedup"] == {"ratio": 2.0, "low": 1.9, "high": 2.1}
    out = replace(fast, refused="it loses 3 points of accuracy")
    news = standings.news(_state(out, slow))
    assert news["leader"] is None, "one that is out does not lead, nor one that is slower than the original"
    assert [(c["candidate"], c["standing"], c["reason"]) for c in news["candidates"]] == [
        ("a", "refused", "it loses 3 points of accuracy")
    ]
