"""What a stage runner tells of its calls, and whoever watches takes down. Pure: by default nobody watches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class StageSeen:
    """One stage call, filled while it runs. `backend`: "" where no engine has a part in it, `several` where it compares
    some; `seconds`: the stage's own work, of the run that succeeded; `waited`: for the machine; `tries`: begun, 0 where
    cached."""

    stage: str
    backend: str = ""
    candidate: str | None = None
    cached: bool = False
    seconds: float = 0.0
    waited: float = 0.0
    tries: int = 0


class Watch:
    """Sees nothing. `waiting` and `held` are called in a call's own thread."""

    @contextmanager
    def stage(self, seen: StageSeen) -> Iterator[None]:  # noqa: ARG002
        """Around a stage call, whatever it ends with."""
        yield

    def waiting(self) -> None:
        """The call waits for the machine."""

    @contextmanager
    def held(self, *, alone: bool) -> Iterator[None]:  # noqa: ARG002
        """Inside the call has the machine; `alone`: or a device, to measure there."""
        yield


NOBODY = Watch()
