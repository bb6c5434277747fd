"""The fuzzers of `benchmarks/fuzz` with a budget of seconds; `docs/security.md` has the figures of the long runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from app.datasets.inspect import describe_dataset
from app.errors import AppError
from benchmarks.fuzz.contract import Found, Run, table
from benchmarks.fuzz.http import crashes
from benchmarks.fuzz.intake import LIMITS, data_sets, fuzzed, models
from benchmarks.fuzz.mutate import mutated
from tests.factories.deployment import Deployment

SECONDS = 3.0


def test_the_seeds_are_taken_or_refused_as_what_they_are(tmp_path: Path) -> None:
    found = fuzzed(400, 7, tmp_path, SECONDS)
    assert not found.finds
    assert found.answers["taken"] > 0
    assert len(found.answers) >= 4, "it comes to different places of the parsers"


def test_a_member_without_a_name_is_damage(tmp_path: Path) -> None:
    """Found by the long run: `zipfile` itself fell over it."""
    content = data_sets()[0]
    name = content.index(b"x.npy", content.index(b"PK\x01\x02"))  # in the directory at the end
    path = tmp_path / "d.npz"
    path.write_bytes(content[:name] + b"\0" + content[name + 1 :])
    with pytest.raises(AppError) as refused:
        describe_dataset(path, "d.npz", LIMITS, tmp_path)
    assert (refused.value.status, refused.value.code) == (422, "invalid_dataset")


def test_a_run_can_be_had_again() -> None:
    seeds = [*models(), *data_sets()]
    first, second = ([mutated(random.Random(3), seeds) for _ in range(20)] for _ in range(2))
    assert first == second


def test_no_upload_crashes_what_looks_into_it(tmp_path: Path) -> None:
    found = fuzzed(3000, 11, tmp_path, SECONDS)
    assert not found.finds, found.finds[:5]


def test_a_long_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    notes = tmp_path / "build" / "contract.jsonl"
    first = Found.noted(notes)
    first.add(Run(5, 1.5, {"GET /v1/jobs 200": 3, "POST /v1/jobs 422": 2}))
    first.add(Run(6, 2.0, {"GET /v1/jobs 200": 4, "GET (none) 401": 8}, report="FAILURES", traces=["Traceback"]))
    again = Found.noted(notes)
    assert (again.inputs, again.refused, again.seconds, len(again.runs)) == (9, 8, 3.5, 2)
    assert (again.reports, again.traces) == (["FAILURES"], ["Traceback"])
    assert table(again.answers).splitlines()[3:] == ["| `GET /v1/jobs` | 200: 7 |", "| `POST /v1/jobs` | 422: 2 |"]


def test_errors_are_found_wherever_in_the_log_they_stand(tmp_path: Path) -> None:
    quiet = "request\n" * 20_000
    (tmp_path / "app-0.log").write_text(f"{quiet}Traceback (most recent call last):\n  here\n{quiet}")
    (found,) = crashes(Deployment(tmp_path, {}, 0))
    assert found.splitlines()[:2] == ["Traceback (most recent call last):", "  here"]
