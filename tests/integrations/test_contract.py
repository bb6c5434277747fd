"""Schemathesis at a real API process, by its OpenAPI document: `benchmarks/fuzz/contract.py` with a budget of a minute.
`docs/security.md` has the figures of the long runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.fuzz.contract import KEYED, Found, fuzz
from tests.factories.deployment import deployment


def test_every_answer_is_one_that_the_document_names(tmp_path: Path) -> None:
    with deployment(tmp_path / "home", KEYED) as deployed:
        notes = tmp_path / "notes.jsonl"
        found = fuzz(deployed, tmp_path, inputs=1200, seconds=60, seed=11, examples=3, found=Found(notes))
    assert not found.reports, found.reports[0][-8000:]
    assert not found.traces, found.traces[:5]
    assert found.inputs >= 300
    assert {key.rpartition(" ")[2] for key in found.answers} >= {"200", "404", "422"}
    assert found.answers["GET /v1/operator/tenants 200"], "its key is an operator's"
    assert found.answers["GET /v1/engines/{engine_id} 200"], "there is an engine to be asked for"
    assert Found.noted(notes).answers == found.answers, "a later run goes on from there"
