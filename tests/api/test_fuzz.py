"""The API answers what its document says, whatever is asked: `benchmarks/fuzz` with a budget of seconds."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from benchmarks.fuzz.http import SETTINGS, Fuzzer, crashes
from tests.factories.deployment import deployment


def test_no_request_crashes_the_api_or_is_answered_otherwise(tmp_path: Path) -> None:
    with deployment(tmp_path / "home", SETTINGS) as deployed:
        with closing(Fuzzer(deployed.port, 11)) as fuzzer:
            found = fuzzer.run(2000, seconds=5)
        traces = crashes(deployed)
    assert not found.finds, found.finds[:5]
    assert not traces, traces[:5]
    assert {status for _, status in found.answers} >= {200, 404, 422}
