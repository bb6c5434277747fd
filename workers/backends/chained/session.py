"""Several loaded engines that are one: every call goes through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.kernel import Session, TensorSpec

if TYPE_CHECKING:
    from workers.kernel import Arrays


class ChainedSession(Session):
    """`inputs`: of the whole, as far as no engine says otherwise; `outputs`: names of those of the whole."""

    def __init__(self, sessions: Sequence[Session], inputs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
        self._sessions, self._names = sessions, list(outputs)
        self._taken = [[spec.name for spec in session.inputs] for session in sessions]
        taken = {spec.name: spec for session in reversed(sessions) for spec in session.inputs}
        given = {spec.name: spec for session in sessions for spec in session.outputs}
        self.inputs = tuple(taken.get(spec.name, spec) for spec in inputs)
        self.outputs = tuple(given[name] for name in outputs)

    def run(self, feeds: Arrays) -> Arrays:
        known = dict(feeds)
        for session, names in zip(self._sessions, self._taken, strict=True):
            known.update(session.run({name: known[name] for name in names}))
        return {name: known[name] for name in self._names}

    def close(self) -> None:
        for session in self._sessions:
            session.close()
