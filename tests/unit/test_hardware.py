"""The machine's description is JSON, and its fingerprint names the kind of machine, not the moment."""

from __future__ import annotations

import json

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
    for change in ({"isa": []}, {"cores": 999}, {"cpu_model": "other"}):
        assert fingerprint({**machine, **change}) != fingerprint(machine)


def test_conditions_are_json() -> None:
    now = conditions()
    json.dumps(now, allow_nan=False)
    assert len(now["load_average"]) == 3
    assert now["affinity"]
