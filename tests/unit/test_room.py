"""A worker whose disk is full leaves jobs to others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from workers import room
from workers.room import Room


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_it_is_full_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = 10
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 0, free))
    found = Room(tmp_path, 10)
    assert found.enough()
    assert not found.short_lately()
    free = 9
    assert not found.enough()
    free = 50
    assert found.enough()
    assert found.short_lately(), "what its job left was cleared away since"
    monkeypatch.setattr(room, "_LATELY_S", 0.0)
    assert not found.short_lately()


def test_a_disk_that_is_not_looked_at_or_cannot_be_is_not_full(tmp_path: Path) -> None:
    assert Room(tmp_path, 0).enough()
    assert Room(tmp_path / "nothing", 1 << 60).enough()
    assert not Room(tmp_path, 1 << 60).enough()
