"""The manifests of the kind `kserve` against the published schemas, and its rules in Prometheus' own tool."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.factories import onnx_models as models
from tests.factories.bundled import bundled
from tests.integrations.environments import environment
from tests.integrations.promtool import promtool
from tests.servers import free_port, running
from workers.serving.kserve import Deployed, manifests
from workers.serving.v2_client import Connection

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


def test_the_image_is_what_the_manifests_say(tmp_path: Path) -> None:
    """Its server starts by their command, answers as the engine does, and tells every metric that they ask for."""
    settings = {"instances": 1, "threads": 1, "max_batch": 4, "max_delay_ms": 1.0}
    traffic = {"settings": settings, "goodput": 100.0, "goodput_proven": True, "p99_limit_ms": 20.0, "memory_mb": 300.0}
    made = bundled("onnxruntime", models.mlp(), tmp_path, deployment={"serving": traffic})
    folder = made.unpacked("kserve", tmp_path / "kserve")
    paths = sorted((folder / "kserve").glob("*.yaml"))
    done = check(*paths)
    assert (len(paths), done.returncode) == (4, 0), done.stdout + done.stderr
    service = yaml.safe_load((folder / "kserve/inferenceservice.yaml").read_text())
    (container,) = service["spec"]["predictor"]["containers"]
    (told,) = container["ports"]
    port = free_port()
    command = [str(port) if part == str(told["containerPort"]) else part for part in container["command"]]
    log = tmp_path / "serve.log"
    with running(
        [sys.executable, folder / "image" / command[1], *command[2:]], log=log, ready=lambda: _ready(port), timeout_s=60
    ):
        connection = Connection(port, service["metadata"]["name"], 10.0)
        expected = made.arrays("expected_output.npz")
        found = connection.infer(made.arrays("sample_input.npz"), list(expected), batched=False)
        connection.close()
        np.testing.assert_allclose(found["logits"], expected["logits"], rtol=1e-4, atol=1e-6)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            metrics = answer.read().decode()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            path = container[probe]["httpGet"]["path"]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}") as answer:
                assert answer.status == 200
    asked = {name for path in paths for name in re.findall(r"anneal_serve_\w+", path.read_text())}
    assert len(asked) == 12
    assert [name for name in asked if not re.search(rf"^{name}[ {{]", metrics, re.MULTILINE)] == []


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2):
            return True
    except OSError:
        return False


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


def test_the_mean_batch_is_recorded(tmp_path: Path) -> None:
    rules = yaml.safe_load(written(MEASURED, tmp_path)["prometheusrule"].read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    given = [series("batch_size_sum", "0+24000x30"), series("batch_size_count", "0+6000x30")]
    name = "anneal_serve:batch_size:mean5m"
    expected = {"labels": f'{name}{{service="resnet-50-int8"}}', "value": 4}
    asked = {"expr": name, "eval_time": "20m", "exp_samples": [expected]}
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [{"interval": "1m", "input_series": given, "promql_expr_test": [asked]}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    command = [promtool(), "test", "rules", "test.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
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
