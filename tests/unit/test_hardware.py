"""The machine's description is JSON, and its fingerprint names the kind of machine, not the moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from workers import hardware
from workers.hardware import conditions, describe, fingerprint


def test_description_is_json_and_names_the_machine() -> None:
    machine = describe()
    assert json.loads(json.dumps(machine)) == machine
    assert machine["kind"] == "cpu"
    assert machine["id"].startswith("cpu-")
    assert machine["id"].endswith(f"-{machine['cores']}c")
    assert machine["memory_bytes"] > 1 << 20
    assert machine["cores"] >= 1


def test_fingerprint_depends_on_what_decides_speed_only() -> None:
    machine = describe()
    assert fingerprint(machine) == fingerprint(describe())
    assert fingerprint({**machine, "memory_bytes": 1, "governor": "powersave", "os": "x"}) == fingerprint(machine)
    changes: tuple[dict[str, Any], ...] = ({"isa": []}, {"cores": 999}, {"cpu_model": "other"}, {"cpu_quota": 0.5})
    for change in changes:
        assert fingerprint({**machine, **change}) != fingerprint(machine)


@pytest.mark.parametrize(("limit", "quota"), [("150000 100000", 1.5), ("max 100000", None)])
def test_the_containers_quota_makes_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, quota: float | None
) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    unlimited = describe()
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert describe()["cpu_quota"] == quota
    assert (fingerprint(describe()) == fingerprint(unlimited)) is (quota is None)


def test_conditions_are_json() -> None:
    now = conditions()
    json.dumps(now, allow_nan=False)
    assert len(now["load_average"]) == 3
    assert now["affinity"]
    assert "thread_environment" not in now  # a stage runs in a bare environment: it would always be empty
