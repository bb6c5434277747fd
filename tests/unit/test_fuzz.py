"""The fuzzers of `benchmarks/fuzz` with a budget of seconds; `docs/security.md` has the figures of the long runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from app.datasets.inspect import describe_dataset
from app.errors import AppError
from benchmarks.fuzz.intake import LIMITS, data_sets, fuzzed, models
from benchmarks.fuzz.mutate import mutated

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
