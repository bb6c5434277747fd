"""The search as a pure policy: from what is known, and the time, to what to ask next. It runs nothing.

    make everybody → time shortly → check while somebody can win → mend → time → tune → time → pair → choose

`advance` and `take` answer new states and change none; asked twice, they answer the same. So a search can be replayed
from a recording, taken up again from its state, and each request answered wherever its candidates can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from workers.candidates import Candidate
from workers.pipeline.budget import search_end
from workers.search import checking, choosing, exhaustive, limits, making, mending, pairing, timing, tuning, winning
from workers.search.draft import Draft, Variants, proposed
from workers.search.objective import BASELINE
from workers.search.requests import Ahead, Answer, Done, Judge, Make, Rank, Request, Stopped, Time, TryShapes
from workers.search.state import Deadlines, Facts, Phase, SearchState
from workers.search.timing import FinalSeconds


class Policy:
    """Of one job. `variants`: the other runtime options worth trying with a candidate's engine; `final_seconds`: what
    the final measurement takes of engines whose calls take so many ms (engine → batch size → ms). Both pure."""

    def __init__(self, facts: Facts, variants: Variants, final_seconds: FinalSeconds) -> None:
        self.facts = facts
        self.variants = variants
        self.final_seconds = final_seconds

    def begin(self, candidates: Iterable[Candidate], deadlines: Deadlines, now: float) -> SearchState:
        table = {c.id: proposed(c) for c in candidates}
        state = SearchState(table, deadlines, Phase.MAKING, few=limits.FEW, phase_began=now)
        d = self._draft(state, now)
        everything = self.facts.spec.search.strategy == "exhaustive"
        making.begin(d, [*table], Phase.EVERY_VARIANT if everything else Phase.MADE)
        return d.state

    def advance(self, state: SearchState, now: float) -> tuple[SearchState, Request | Done | Stopped]:
        """What to ask next, and the state with what was decided on the way there."""
        d = self._draft(state, now)
        while True:
            if d.state.stopped is not None:
                return d.state, Stopped(d.state.stopped)
            if d.state.phase is Phase.OVER:
                return d.state, Done(d.state.finalists, d.state.exhausted, d.state.out_of_reach)
            request = self._ask(d)
            if request is not None:
                return d.state, request

    def ahead(self, state: SearchState, now: float) -> Sequence[Ahead]:
        """What it will ask for from here on, as far as that can be told, the next one first."""
        d = self._draft(state, now)
        tells: dict[Phase, Callable[[Draft], Sequence[Ahead]]] = {
            Phase.MAKING: making.ahead,
            Phase.CHECKING: winning.ahead,
            Phase.CHECKING_ALL: exhaustive.ahead,
        }
        tell = tells.get(d.state.phase)
        return tell(d) if tell else ()

    def take(self, state: SearchState, request: Request, answer: Answer, now: float) -> SearchState:
        """The state with what was told."""
        d = self._draft(state, now)
        match request, d.state.phase:
            case Make(), Phase.MAKING:
                making.take(d, request, answer)
            case Make(), (Phase.VARYING | Phase.PAIR_VARYING):
                tuning.take(d, request, answer)
            case Time(), _:
                timing.take(d, request, answer)
            case Judge(), Phase.CHECKING_ALL:
                exhaustive.take(d, request, answer)
            case ((Make() | Judge() | TryShapes() | Rank()), Phase.MENDING):
                mending.take(d, request, answer)
            case ((Judge() | TryShapes()), _):
                checking.take(d, request, answer)
            case _:
                raise ValueError(f"no {type(request).__name__} is asked for while {d.state.phase}")
        return d.state

    def _draft(self, state: SearchState, now: float) -> Draft:
        return Draft(self.facts, state, now, self.variants)

    def _ask(self, d: Draft) -> Request | None:
        """The next request of the phase; None where it is over, and the next one is begun."""
        asks: dict[Phase, Callable[[Draft], Request | None]] = {
            Phase.MAKING: making.ask,
            Phase.MADE: _made,
            Phase.TIMING: timing.ask,
            Phase.SCREENED: self._screened,
            Phase.CHECKING: _checking,
            Phase.MENDING: _mending,
            Phase.MENDED: _mended,
            Phase.VARYING: tuning.ask,
            Phase.TUNED: _tuned,
            Phase.PAIRING: pairing.ask,
            Phase.PAIR_VARYING: pairing.ask_varied,
            Phase.BORDER: pairing.ask_border,
            Phase.CHOOSING: _choosing,
            Phase.EVERY_VARIANT: exhaustive.add_variants,
            Phase.CHECKING_ALL: _checking_all,
        }
        return asks[d.state.phase](d)

    def _screened(self, d: Draft) -> None:
        if timing.nothing_is_fast_enough(d):
            d.state.phase = Phase.OVER
            return
        self._keep_time_for_the_final(d)
        winning.begin(d)

    def _keep_time_for_the_final(self, d: Draft) -> None:
        """Now that it is known what a call takes."""
        calls = timing.call_times(d)
        original = {batch: ms for batch, ms in calls[BASELINE].items() if ms is not None}
        if not original:
            return
        d.state.sample_ms = min(ms / batch for batch, ms in original.items())
        checking.expect(d, d.state.sample_ms)
        seconds, at = self.final_seconds(calls), d.deadlines
        until = search_end(d.now, at.end, at.search_until, seconds)
        d.state.deadlines = replace(at, search_until=until, final_seconds=seconds)


def _made(d: Draft) -> None:
    if making.nothing_is_small_enough(d):
        d.state.phase = Phase.OVER
        return
    sizes = timing.first_batch_sizes(d)
    timing.begin(d, d.alive(), limits.SCREEN_SECONDS, "short timing", Phase.SCREENED, sizes)


def _checking(d: Draft) -> Request | None:
    request = winning.ask(d)
    if request is None:
        mending.begin(d)
    return request


def _mending(d: Draft) -> Request | None:
    request = mending.ask(d)
    if request is None:
        d.state.phase = Phase.MENDED
        if d.state.mended:
            sizes = timing.first_batch_sizes(d)
            timing.begin(d, d.state.mended, limits.SCREEN_SECONDS, "timing of the mended ones", Phase.MENDED, sizes)
    return request


def _mended(d: Draft) -> None:
    mending.untimed(d, d.state.mended)
    d.phase_ends("winning accuracy back", len(d.state.mended))
    d.state.accurate = (*d.state.accurate, *(i for i in d.state.mended if d[i].refused is None))
    tuning.begin(d)


def _tuned(d: Draft) -> Request | None:
    request = tuning.ask_tuned(d)
    if request is None:
        if winning.anybody_left(d):
            winning.begin(d)
        else:
            pairing.begin(d)
    return request


def _choosing(d: Draft) -> None:
    choosing.choose(d, pairing.members(d))
    d.state.phase = Phase.OVER


def _checking_all(d: Draft) -> Request | None:
    request = exhaustive.ask(d)
    if request is None:
        d.state.phase = Phase.OVER
    return request
