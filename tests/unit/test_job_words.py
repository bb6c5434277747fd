"""What a job's page calls the steps."""

from __future__ import annotations

from app.web.job_view import STAGES
from workers.kernel import stages


def test_every_stage_of_this_repository_has_words() -> None:
    own = {name for name, stage in stages().items() if stage.__module__.startswith("workers.")}
    assert len(own) > 15
    assert own - set(STAGES) == set()
