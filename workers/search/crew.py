"""A job's requests, answered by several workers: what will be asked is handed out ahead, to whoever is idle.

The job's own worker goes through the requests in the policy's order, as it would alone. Helpers begin at the other end,
so the two meet, and what a helper made costs the worker a look into storage. What nobody has begun it makes itself;
while it waits for a helper, it makes what else is left. So a helper that is lost costs its call, and where nobody helps
nothing is lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import structlog
from sqlalchemy.exc import SQLAlchemyError

from app.sharing.service import CallState, Offer
from workers.candidates import Candidate
from workers.pipeline.isolated import Interrupted
from workers.search.calls import Call
from workers.search.requests import Ahead, Answer, Examine, Refer, Request, Time, subjects_of

log = structlog.get_logger(__name__)

_LOOK_S = 0.1
_LEFT = (Refer, Examine)  # to others, until this worker needs it itself
_FEWEST = 1  # beside the one that this worker makes now


class Board(Protocol):
    """Where calls are handed out, and who would take them (`app.sharing.service.CallBoard`)."""

    def offer(self, offers: Sequence[Offer]) -> None: ...

    def states(self) -> Mapping[str, CallState]: ...

    def take_back(self, call_id: str) -> bool: ...

    def withdraw(self, ids: Collection[str] | None = None) -> None: ...

    def doing(self, key: str) -> bool: ...


class Crew:
    """Of one job. `helpers`: how many workers could take a call on now or later, and how many are idle; `kind`: that a
    call on these candidates asks for; `ring`: wakes so many."""

    def __init__(
        self,
        board: Board,
        *,
        helpers: Callable[[], tuple[int, int]],
        kind: Callable[[Collection[Candidate]], str],
        machine: str,
        ring: Callable[[int], object],
        should_stop: Callable[[], bool],
    ) -> None:
        self._board, self._helpers, self._kind = board, helpers, kind
        self._machine, self._ring, self._should_stop = machine, ring, should_stop
        self._out: dict[str, Call] = {}
        self._sure: set[str] = set()  # of all that was handed out
        self._beside: list[Ahead] = []
        self._before: dict[str, tuple[Request, Answer]] = {}  # answered while something else was waited for
        self._handed_out = False
        self._alone = False  # the database refused to hand something out

    def answer(
        self, request: Request, ahead: Sequence[Ahead], now: Callable[[], float], answer: Callable[[Request], Answer]
    ) -> list[tuple[Request, Answer]]:
        """As `answer` does, once nobody else is at it; and what else was made meanwhile of what is needed in any case:
        it costs no time any more, so none of it is to fall for want of that. `ahead`: what will be asked from here on;
        `now`: seconds of the job's budget. Raises `Interrupted`, and whatever `answer` does."""
        call = Call(request, now())
        self._hand_out(call, ahead)
        if call.id in self._before:
            told = self._before.pop(call.id)[1]
        else:
            if call.id in self._out:
                self._wait_for(call, now, answer)
                self._out.pop(call.id, None)
            told = answer(request)
        return [(request, told), *self._made_meanwhile(answer)]

    def beside(self, request: Refer | Examine, *, apart: bool) -> None:
        """What the job will need, and others may find out from now on until it is over; this worker leaves it to them
        as long as it can. `apart`: by workers on other machines, for as long as they take; else on any, until this one
        measures for the first time."""
        self._beside.append(Ahead(request, sure=not apart))

    def answer_all(
        self, wanted: Sequence[Ahead], now: Callable[[], float], answer: Callable[[Request], Answer]
    ) -> None:
        """All of these, in their order as far as nobody else is at them. Nothing is out afterwards."""
        left = {Call(a.request, 0.0).id: a for a in wanted}
        try:
            while left:
                first = next(iter(left.values()))
                for done, _ in self.answer(first.request, [*left.values()], now, answer):
                    left.pop(Call(done, 0.0).id, None)
        finally:
            self.over()

    def _made_meanwhile(self, answer: Callable[[Request], Answer]) -> list[tuple[Request, Answer]]:
        found = [self._before.pop(i) for i in [*self._before] if i in self._sure]
        states = self._board.states() if self._out else {}
        self._beside = [a for a in self._beside if states.get(Call(a.request, 0.0).id) is not CallState.ENDED]
        for call_id in [i for i in self._out if i in self._sure and states.get(i) is CallState.ENDED]:
            made = self._out.pop(call_id).request
            found.append((made, answer(made)))
        return found

    def over(self) -> None:
        """Nothing is out any more."""
        self._beside.clear()
        if not self._handed_out:
            return
        self._out.clear()
        self._handed_out = False
        try:
            self._board.withdraw()
        except SQLAlchemyError as error:  # nobody takes it once the search is over and the job ends
            log.warning("calls_not_withdrawn", error=str(error)[:200])

    def elsewhere(self, key: str, seconds: float) -> bool:
        """Wait while a helper computes the stage with this key, so long at most; whether there was one. Raises
        `Interrupted`."""
        until, waited = time.monotonic() + seconds, False
        while self._out and time.monotonic() < until and self._board.doing(key):
            waited = True
            self._pause()
        return waited

    def _hand_out(self, now_asked: Call, ahead: Sequence[Ahead]) -> None:
        if isinstance(now_asked.request, Time):  # a helper on this machine that has to stop holds it up for a moment
            self._beside = [a for a in self._beside if not a.sure]
        # What any machine may do comes first, as it is taken from the end: what the search waits for goes before it.
        every = [*(a for a in self._beside if a.sure), *ahead, *(a for a in self._beside if not a.sure)]
        wanted = {(call := Call(a.request, now_asked.now)).id: (call, a.sure) for a in every}
        gone = [i for i in self._out if i not in wanted and i != now_asked.id]
        new = [i for i in wanted if i not in self._out and i not in self._before and i != now_asked.id]
        try:
            if gone:
                self._board.withdraw(gone)
                for call_id in gone:
                    del self._out[call_id]
            if len(new) < _FEWEST or self._alone:
                return
            others, idle = self._helpers()
            if others:
                self._handed_out = True
                self._board.offer([self._offer(*wanted[i], position) for position, i in enumerate(new)])
                self._out |= {i: wanted[i][0] for i in new}
                self._sure |= {i for i in new if wanted[i][1] and not isinstance(wanted[i][0].request, _LEFT)}
                self._ring(min(idle, len(new)))
        except SQLAlchemyError as error:  # nobody's help is no reason to fail
            log.warning("calls_not_handed_out", error=str(error)[:200])
            self._alone = True

    def _offer(self, call: Call, sure: bool, position: int) -> Offer:
        """What is needed in any case is taken from the end, as this worker begins at the front. What may be for nothing
        is taken by its chances, and not on this worker's own machine: there it would take from what is needed."""
        turn, apart = (-position, None) if sure else (position, self._machine)
        subjects = [c for s in subjects_of(call.request) for c in (s.candidate, s.base) if c is not None]
        return Offer(call.id, call.to_json(), turn, self._kind(subjects), apart)

    def _wait_for(self, call: Call, now: Callable[[], float], answer: Callable[[Request], Answer]) -> None:
        """Until it is answered, or nobody is at it."""
        while True:
            states = self._board.states()
            state = states.get(call.id)
            if state in (None, CallState.ENDED) or (state is CallState.FREE and self._board.take_back(call.id)):
                return
            if now() >= _until(call.request):
                self._board.withdraw([call.id])  # as the policy sees it, the time is over
                return
            if not self._meanwhile(states, call, now, answer):
                self._pause()

    def _meanwhile(
        self,
        states: Mapping[str, CallState],
        waited_for: Call,
        now: Callable[[], float],
        answer: Callable[[Request], Answer],
    ) -> bool:
        """Make another one that nobody is at; whether there was one."""
        for call_id, call in [*self._out.items()]:
            if call_id == waited_for.id or isinstance(call.request, _LEFT):
                continue
            due = states.get(call_id) is CallState.FREE and now() < _until(call.request)
            if due and self._board.take_back(call_id):
                del self._out[call_id]
                self._before[call_id] = (call.request, answer(call.request))
                return True
        return False

    def _pause(self) -> None:
        if self._should_stop():
            raise Interrupted
        time.sleep(_LOOK_S)


def _until(request: Request) -> float:
    assert not isinstance(request, Time), "what measures stays here"
    return request.until
