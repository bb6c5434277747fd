"""What lets a worker write about a job."""

from __future__ import annotations

from typing import Any, Protocol

from sqlalchemy import ColumnElement


class Hold(Protocol):
    """A right that may be over by the time it is used: every write asks, in its own statement, whether `holds()`."""

    @property
    def job_id(self) -> str: ...

    @property
    def tenant_id(self) -> str: ...

    @property
    def owner(self) -> str: ...

    @property
    def spent_seconds(self) -> float:
        """Of the job's budget, by the attempts before this one."""

    def holds(self) -> list[ColumnElement[bool]]:
        """Conditions on the job's row, true as long as the right is this worker's."""

    def with_a_result(self) -> dict[str, Any]:
        """Columns of the job that change with a stage's result."""

    def seen(self, changes: dict[str, Any], event: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What clients see of the progress that a stage runner tells, as columns of the job and as an event; None:
        nothing."""
