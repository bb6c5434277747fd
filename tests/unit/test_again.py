"""What `make test` does with a failed test: once more, alone, and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import again

TESTS = """
from pathlib import Path

def test_that_needs_company_gone():
    first = not Path("seen").exists()
    Path("seen").write_text("")
    assert not first

def test_that_never_passes():
    assert False
"""


def _failed(*tests: str) -> None:
    cache = Path(".pytest_cache") / "v" / "cache"
    cache.mkdir(parents=True)
    (cache / "lastfailed").write_text(json.dumps(dict.fromkeys(tests, True)))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def test_one_that_passes_alone_is_told(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _failed("test_it.py::test_that_needs_company_gone")
    (folder / "seen").write_text("")
    assert again.main() == 0
    assert "FAILED BESIDE OTHERS, passed alone: look into it: test_it.py::test_that_needs" in capfd.readouterr().out


def test_one_that_fails_twice_fails(capfd: pytest.CaptureFixture[str]) -> None:
    _failed("test_it.py::test_that_needs_company_gone", "test_it.py::test_that_never_passes")
    assert again.main() == 1
    assert "failed twice: test_it.py::test_that_never_passes" in capfd.readouterr().out


def test_many_are_no_accident(capfd: pytest.CaptureFixture[str]) -> None:
    _failed(*(f"test_it.py::test_{i}" for i in range(again.MOST + 1)))
    assert again.main() == 1
    assert "4 tests failed" in capfd.readouterr().out


def test_a_run_that_broke_off_without_a_failed_test_stays_failed() -> None:
    assert again.main() == 1
