"""The manifests of the kind `kserve` against the published schemas, and its rules in Prometheus' own tool."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integrations.environments import environment
from tests.integrations.promtool import promtool
from workers.serving.kserve import Deployed, manifests

CHECK = Path(__file__).with_name("kubernetes_check.py")
MEASURED = Deployed(
    name="ResNet 50_int8",
    machine="a machine: of 4 cores # quiet",
    instances=2,
    cpus=4,
    memory_mb=812.3,
    memory_basis="of the server",
    rate=163.49,
    rate_interval=[150.2, 170.9],
    p99_ms=20.0,
    start_seconds=3.2,
)
UNKNOWN = Deployed("9 m", "a machine", 1, 2, None, "", pod_resource="nvidia.com/gpu", reason="the budget ended")


def written(deployed: Deployed, folder: Path) -> dict[str, Path]:
    """The manifests, by their names without ending."""
    found = {}
    for name, text in manifests(deployed).texts.items():
        path = folder / Path(name).name
        path.write_bytes(text)
        if path.suffix == ".yaml":
            found[path.stem] = path
    return found


def check(*paths: Path) -> subprocess.CompletedProcess[str]:
    python = environment("kubernetes") / "bin" / "python"
    return subprocess.run([python, CHECK, *paths], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("deployed", [MEASURED, UNKNOWN], ids=["measured", "unknown"])
def test_the_manifests_fit_the_published_schemas(deployed: Deployed, tmp_path: Path) -> None:
    paths = written(deployed, tmp_path)
    assert ("scaledobject" in paths) == (deployed.rate is not None)
    done = check(*paths.values())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("inferenceservice", "minReplicas"),
        ("inferenceservice", "periodSeconds"),
        ("scaledobject", "metricType"),
        ("podmonitor", "interval"),
        ("prometheusrule", "expr"),
    ],
)
def test_the_check_finds_a_field_that_there_is_not(name: str, field: str, tmp_path: Path) -> None:
    path = written(MEASURED, tmp_path)[name]
    path.write_text(path.read_text().replace(f"{field}:", f"{field}x:"))
    assert check(path).returncode == 1


def series(name: str, values: str, **labels: str) -> dict[str, str]:
    told = {"pod": "resnet-50-int8-predictor-1", **labels}
    inside = ",".join(f'{key}="{value}"' for key, value in told.items())
    return {"series": f"anneal_serve_{name}{{{inside}}}", "values": values}


def calls(per_minute: int, **labels: str) -> dict[str, str]:
    return series("requests_total", f"0+{per_minute}x30", **labels)


UP, WANTED = series("instances_up", "2x30"), series("instances", "2x30")
WAITING, LIMIT = series("waiting", "250x30"), series("queue_limit", "256x30")
FAST = [
    series("request_seconds_bucket", "0+6000x30", le="0.01"),
    series("request_seconds_bucket", "0+6000x30", le="+Inf"),
]
SLOW = [
    series("request_seconds_bucket", "0+5000x30", le="0.025"),
    series("request_seconds_bucket", "0+6000x30", le="0.05"),
    series("request_seconds_bucket", "0+6000x30", le="+Inf"),
]


@pytest.mark.parametrize(
    ("given", "fires"),
    [
        ([calls(6000, outcome="ok"), calls(600, outcome="cancelled"), UP, WANTED, LIMIT, *FAST], set()),
        ([calls(12000, outcome="ok"), UP, WANTED], {"Saturated"}),
        ([calls(6000, outcome="ok"), calls(100, outcome="queue_full"), UP, WANTED], {"RequestsFail"}),
        ([calls(6000, outcome="ok"), UP, WANTED, *SLOW], {"P99AboveLimit"}),
        ([WAITING, LIMIT], {"QueueFills"}),
        ([series("instances_up", "1x30"), WANTED], {"InstancesMissing"}),
    ],
    ids=["well", "saturated", "failing", "slow", "queue", "missing"],
)
def test_the_rules_fire_at_what_was_measured(given: list[dict[str, str]], fires: set[str], tmp_path: Path) -> None:
    rules = yaml.safe_load(written(MEASURED, tmp_path)["prometheusrule"].read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    names = [rule["alert"] for rule in rules["groups"][0]["rules"]]
    assert len(names) == 5
    pod = {"pod": "resnet-50-int8-predictor-1"}
    expected: list[dict[str, Any]] = []
    for rule in rules["groups"][0]["rules"]:
        labels = {"severity": "warning", **(pod if rule["alert"] in ("QueueFills", "InstancesMissing") else {})}
        alert = {"exp_labels": labels, "exp_annotations": rule["annotations"]}
        told = [alert] if rule["alert"] in fires else []
        expected.append({"eval_time": "20m", "alertname": rule["alert"], "exp_alerts": told})
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [{"interval": "1m", "input_series": given, "alert_rule_test": expected}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "test.yaml"]):
        done = subprocess.run([promtool(), *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_was_not_measured_is_left_out_and_told(tmp_path: Path) -> None:
    paths = written(UNKNOWN, tmp_path)
    service = yaml.safe_load(paths["inferenceservice"].read_text())
    assert service["metadata"]["name"] == "m-9-m"
    (container,) = service["spec"]["predictor"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "2"}, "limits": {"nvidia.com/gpu": "1"}}
    assert "No memory is asked for" in paths["inferenceservice"].read_text()
    assert "No ScaledObject, one replica" in paths["inferenceservice"].read_text()
    rules = yaml.safe_load(paths["prometheusrule"].read_text())["spec"]["groups"][0]["rules"]
    assert [rule["alert"] for rule in rules] == ["RequestsFail", "QueueFills", "InstancesMissing"]
    assert "No rule on p99: no limit was told (the budget ended)" in paths["prometheusrule"].read_text()
    measured = yaml.safe_load(written(MEASURED, tmp_path)["inferenceservice"].read_text())
    (container,) = measured["spec"]["predictor"]["containers"]
    assert container["resources"] == {"requests": {"cpu": "4", "memory": "775Mi"}}, "rounded up to 2^20 bytes"
