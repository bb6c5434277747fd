"""Several loaded engines that are one: every call goes to the one for its batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workers.kernel import Session

if TYPE_CHECKING:
    from workers.kernel import Arrays


class ByBatchSession(Session):
    """`most`: the largest batch of each, by growing size, None for the last. `name`, `axis`: of the input whose axis
    holds the batch."""

    def __init__(self, sessions: Sequence[Session], most: Sequence[int | None], name: str, axis: int) -> None:
        self._sessions, self._most, self._name, self._axis = sessions, most, name, axis
        self.inputs, self.outputs = sessions[0].inputs, sessions[0].outputs

    def _chosen(self, feeds: Arrays) -> Session:
        size = np.shape(feeds[self._name])[self._axis]
        return next(s for s, most in zip(self._sessions, self._most, strict=True) if most is None or size <= most)

    def run(self, feeds: Arrays) -> Arrays:
        return self._chosen(feeds).run(feeds)

    def call(self, feeds: Arrays) -> Callable[[], Any]:
        """With the choice, which a caller of the bundle's `run` pays for, too."""
        call = self._chosen(feeds).call(feeds)

        def chosen() -> Any:
            self._chosen(feeds)
            return call()

        return chosen

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        return self._chosen(feeds).bind(feeds)

    def profile(self, feeds: Arrays) -> Mapping[str, Any] | None:
        return self._chosen(feeds).profile(feeds)

    def close(self) -> None:
        for session in self._sessions:
            session.close()
