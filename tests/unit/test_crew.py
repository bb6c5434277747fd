"""A search's requests on several workers, without any: what is handed out and taken back, and who waits for whom."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.sharing.service import CallState, Offer
from workers.candidates import Candidate
from workers.pipeline.isolated import Interrupted
from workers.search import crew as module
from workers.search.calls import Call
from workers.search.crew import Crew
from workers.search.requests import Ahead, Answer, Examine, Make, Refer, Request, Subject, Time


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)


def make(name: str, until: float = 100.0) -> Make:
    return Make(Subject(Candidate(name, name, "onnxruntime", "fp32", ())), until)


def sure(*requests: Make) -> list[Ahead]:
    return [Ahead(r, sure=True) for r in requests]


def id_of(request: Request) -> str:
    return Call(request, 0.0).id


class Board:
    """In memory. `looks`: called with the board at each look, as time goes by."""

    def __init__(self) -> None:
        self.out: dict[str, CallState] = {}
        self.offers: list[Offer] = []
        self.looks: list[Callable[[], None]] = []
        self.away = False

    def offer(self, offers: Sequence[Offer]) -> None:
        if self.away:
            raise OperationalError("INSERT", {}, Exception("away"))
        self.offers += offers
        self.out |= {o.id: CallState.FREE for o in offers}

    def states(self) -> dict[str, CallState]:
        if self.looks:
            self.looks.pop(0)()
        return dict(self.out)

    def take_back(self, call_id: str) -> bool:
        return self.out.get(call_id) is CallState.FREE and self.out.pop(call_id) is not None

    def withdraw(self, ids: Collection[str] | None = None) -> None:
        for call_id in [*self.out] if ids is None else ids:
            self.out.pop(call_id, None)

    def doing(self, key: str) -> bool:
        return bool(self.looks) and self.looks.pop(0)() is None

    def holds(self, request: Request, state: CallState = CallState.HELD) -> None:
        self.out[id_of(request)] = state


class Together:
    """A crew, and what its own worker answered in order."""

    def __init__(self, others: int = 2, idle: int = 2) -> None:
        self.board, self.rung, self.answered, self.now, self.stop = Board(), [0], list[str](), 0.0, False
        self.others, self.idle = others, idle
        self.crew = Crew(
            self.board,
            helpers=lambda: (self.others, self.idle),
            kind=lambda candidates: "+".join(c.id for c in candidates),
            machine="here",
            ring=self.rung.append,
            should_stop=lambda: self.stop,
        )

    def ask(self, request: Request, ahead: Sequence[Ahead] = ()) -> Answer:
        return self.ask_all(request, ahead)[0][1]

    def ask_all(self, request: Request, ahead: Sequence[Ahead] = ()) -> list[tuple[Request, Answer]]:
        return self.crew.answer(request, ahead, lambda: self.now, self._answer)

    def _answer(self, request: Any) -> Answer:
        self.answered.append(request.subject.id)
        return {"built": request.subject.id}


A, B, C, D = (make(name) for name in "abcd")


def test_what_lies_ahead_is_handed_out_from_the_end_and_only_so_many_are_woken() -> None:
    with_two = Together()
    with_two.ask(A, sure(A, B, C, D))
    assert [o.id for o in with_two.board.offers] == [id_of(r) for r in (B, C, D)]
    assert [o.turn for o in with_two.board.offers] == [0, -1, -2], "the smallest turn is taken first"
    assert [o.kind for o in with_two.board.offers] == ["b", "c", "d"]
    assert Call.from_json(with_two.board.offers[0].body).request == B
    assert with_two.rung[1:] == [2]
    assert with_two.answered == ["a"]
    with_two.ask(B, sure(B, C, D))
    assert len(with_two.board.offers) == 3, "once"


def test_alone_it_goes_through_them_in_order_and_hands_out_nothing() -> None:
    alone = Together(others=0)
    for request, ahead in ((A, (A, B)), (B, (B,))):
        assert alone.ask(request, sure(*ahead)) == {"built": request.subject.id}
    assert not alone.board.offers
    assert alone.answered == ["a", "b"]
    one = Together()
    one.ask(A, sure(A))
    assert not one.board.offers, "there is nothing beside it"


def test_what_nobody_has_begun_is_made_here_and_what_ended_is_looked_up() -> None:
    with_two = Together()
    with_two.ask(A, sure(A, B, C))
    with_two.board.holds(C, CallState.ENDED)
    told = with_two.ask_all(B, sure(B, C))
    assert id_of(B) not in with_two.board.out, "nobody else takes it now"
    assert told == [(B, {"built": "b"}), (C, {"built": "c"})], "what is made falls not for want of time"
    assert with_two.answered == ["a", "b", "c"], "by results that are in storage, the last one"


def test_while_it_waits_for_a_helper_it_makes_what_else_is_left() -> None:
    with_two = Together()
    with_two.ask(A, sure(A, B, C, D))
    board = with_two.board
    board.holds(B)
    board.holds(D)
    board.looks = [lambda: None, lambda: None, lambda: None, lambda: board.holds(B, CallState.ENDED)]
    assert [r for r, _ in with_two.ask_all(B, sure(B, C, D))] == [B, C]
    assert with_two.answered == ["a", "c", "b"]
    board.looks = [lambda: board.holds(D, CallState.FREE)]  # its helper is lost
    assert with_two.ask(D, sure(D)) == {"built": "d"}
    assert with_two.answered == ["a", "c", "b", "d"]


def test_a_helper_is_not_waited_for_beyond_the_time_of_the_call() -> None:
    with_one, late = Together(), make("late", until=10.0)
    with_one.ask(A, sure(A, late))
    with_one.board.holds(late)
    with_one.now = 10.0
    with_one.ask(late, sure(late))
    assert with_one.answered == ["a", "late"]
    assert not with_one.board.out, "who was at it stops"


def test_who_waits_can_be_stopped() -> None:
    with_one = Together()
    with_one.ask(A, sure(A, B))
    with_one.board.holds(B)
    with_one.stop = True
    with pytest.raises(Interrupted):
        with_one.ask(B, sure(B))


def test_what_is_not_asked_any_more_is_withdrawn_whoever_is_at_it() -> None:
    with_two = Together()
    with_two.ask(A, sure(A, B, C))
    with_two.board.holds(C)
    with_two.ask(B, sure(B))
    assert not with_two.board.out
    with_two.ask(C, sure(C, D))
    with_two.board.holds(D, CallState.ENDED)
    with_two.ask(D, sure(D))
    assert with_two.board.out
    with_two.crew.over()
    assert not with_two.board.out


def test_what_may_be_for_nothing_is_made_on_other_machines_by_its_chances() -> None:
    with_two = Together()
    with_two.ask(A, [Ahead(r, sure=False) for r in (A, B, C)])
    assert [(o.turn, o.apart) for o in with_two.board.offers] == [(0, "here"), (1, "here")]


def test_a_database_that_is_away_is_no_reason_to_fail() -> None:
    with_two = Together()
    with_two.board.away = True
    assert with_two.ask(A, sure(A, B)) == {"built": "a"}
    with_two.board.away = False
    assert with_two.ask(B, sure(B, C)) == {"built": "b"}
    assert not with_two.board.offers, "it goes on alone"


def test_a_stage_that_a_helper_computes_is_waited_for() -> None:
    with_one = Together()
    assert not with_one.crew.elsewhere("key", 1.0), "nothing is out"
    with_one.ask(A, sure(A, B))
    assert not with_one.crew.elsewhere("key", 1.0)
    with_one.board.looks = [lambda: None, lambda: None]
    assert with_one.crew.elsewhere("key", 1.0)
    assert not with_one.board.looks


LATER = Refer(500.0)


def test_what_the_job_will_need_stays_out_whatever_is_asked_and_is_not_made_here() -> None:
    with_two = Together()
    board = with_two.board
    with_two.crew.beside(LATER, apart=True)
    with_two.ask(A, sure(A, B))
    assert [(o.id, o.turn, o.apart) for o in board.offers] == [(id_of(B), 0, None), (id_of(LATER), 1, "here")]
    board.holds(B)
    board.looks = [lambda: None, lambda: board.holds(B, CallState.ENDED)]
    with_two.ask(B, sure(B))
    with_two.ask(C)
    assert with_two.answered == ["a", "b", "c"]
    assert board.out[id_of(LATER)] is CallState.FREE, "one that measures does not end it"
    assert len(board.offers) == 2, "once"
    with_two.crew.over()
    assert not board.out
    with_two.ask(D, sure(D, A))
    assert [o.id for o in board.offers[2:]] == [id_of(A)], "it is not needed any more"


def test_what_any_machine_may_find_out_comes_last_and_ends_with_the_first_measurement() -> None:
    with_two, asked = Together(), Examine("tensorrt", 500.0)
    board = with_two.board
    with_two.crew.beside(asked, apart=False)
    with_two.ask(A, sure(A, B, C))
    assert [(o.id, o.turn, o.apart) for o in board.offers] == [
        (id_of(asked), 0, None), (id_of(B), -1, None), (id_of(C), -2, None),
    ]  # fmt: skip
    for request in (B, C):
        assert with_two.ask_all(request, sure(request)) == [(request, {"built": request.subject.id})]
    board.holds(asked)
    short: Any = Time((), 0.4, None, 100.0)
    with_two.crew.answer(short, [], lambda: 0.0, lambda _: {})
    assert id_of(asked) not in board.out, "whoever is at it stops"
    with_two.ask(D, sure(D, A))
    assert [o.id for o in board.offers[3:]] == [id_of(A)], "it is this worker's now"


def test_what_others_found_out_is_asked_once_and_the_search_is_not_told_of_it() -> None:
    with_two, asked = Together(), Examine("tensorrt", 500.0)
    with_two.crew.beside(asked, apart=False)
    with_two.ask(A, sure(A, B))
    with_two.board.holds(asked, CallState.ENDED)
    assert with_two.ask_all(B, sure(B)) == [(B, {"built": "b"})]
    assert with_two.ask_all(C) == [(C, {"built": "c"})]
    assert [o.id for o in with_two.board.offers] == [id_of(asked), id_of(B)]


def test_all_are_answered_once_whoever_makes_them() -> None:
    with_two = Together()
    board = with_two.board
    board.looks = [lambda: board.holds(D, CallState.ENDED), lambda: board.holds(C)]
    board.looks += [lambda: None, lambda: board.holds(C, CallState.ENDED)]
    with_two.crew.answer_all(sure(A, B, C, D), lambda: 0.0, with_two._answer)
    assert sorted(with_two.answered) == ["a", "b", "c", "d"]
    assert not board.out


def test_where_one_of_them_raises_nothing_stays_out() -> None:
    with_two = Together()

    def answer(request: Any) -> Answer:
        if request == B:
            raise ZeroDivisionError
        return {}

    with pytest.raises(ZeroDivisionError):
        with_two.crew.answer_all(sure(A, B, C), lambda: 0.0, answer)
    assert not with_two.board.out
