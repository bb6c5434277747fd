"""Prometheus' own tool on the service's configuration, rules and dashboards: they parse, and each alert fires at what
it is for and at nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.topology import of_prometheus
from tests.factories.deployment import deployment
from tests.integrations.environments import REPOSITORY
from tests.integrations.promtool import prometheus, promtool
from tests.servers import free_port, running
from tests.unit.test_observability import dashboard_queries, rules

FOLDER = REPOSITORY / "docker" / "prometheus"
CASES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("alerts_test.yml").read_text())
ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}


def tool(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool(), *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_configuration_and_the_rules_are_prometheus_own() -> None:
    for command in (("check", "config", "prometheus.yml"), ("check", "rules", "recording.yml", "alerts.yml")):
        done = tool(FOLDER, *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboards_ask_in_prometheus_own_language(tmp_path: Path) -> None:
    queries = [query.replace('"$worker"', '".*"') for query in dashboard_queries()]
    recorded = [{"record": f"query_{index}", "expr": query} for index, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": recorded}]}))
    done = tool(tmp_path, "check", "rules", "rules.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(queries)} rules found" in done.stdout


@pytest.mark.parametrize("case", CASES["tests"], ids=lambda case: case["name"].replace(" ", "-"))
def test_alerts_fire_at_what_they_are_for(case: dict[str, Any], tmp_path: Path) -> None:
    for name in CASES["rule_files"]:
        text = (FOLDER / name).read_text()
        # What is said beside is for people; its numbers are compared with nothing here.
        (tmp_path / name).write_text(re.sub(r"^( +summary: ).*$", r"\1x", text, flags=re.MULTILINE))
    at, fired = case["fires"]["at"], case["fires"]["alerts"]
    expected = []
    for name, rule in ALERTS.items():
        annotations = {"summary": "x", "runbook": rule["annotations"]["runbook"]}
        alerts = [{"exp_labels": a["labels"], "exp_annotations": annotations} for a in fired if a["name"] == name]
        expected.append({"eval_time": at, "alertname": name, "exp_alerts": alerts})
    test = {key: value for key, value in case.items() if key != "fires"}
    document = {**CASES, "tests": [{**test, "alert_rule_test": expected}]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(document))
    done = tool(tmp_path, "test", "rules", "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_to_fire() -> None:
    fired = {alert["name"] for case in CASES["tests"] for alert in case["fires"]["alerts"]}
    assert fired == set(ALERTS)


def test_the_texts_of_the_alerts_can_be_rendered(tmp_path: Path) -> None:
    """By the tool itself, with the labels that there are: an unknown function or a broken brace fails."""
    for name in CASES["rule_files"]:
        shutil.copy(FOLDER / name, tmp_path)
    case = next(case for case in CASES["tests"] if case["name"] == "no worker is live, and jobs wait")
    wanted = ALERTS["AnnealQueueWithoutWorker"]["annotations"]
    summary = "5 jobs wait in anneal.cpu, which no worker takes from"
    alert = {
        "exp_labels": {"severity": "ticket", "queue": "anneal.cpu"},
        "exp_annotations": {"summary": summary, "runbook": wanted["runbook"]},
    }
    test = {key: value for key, value in case.items() if key != "fires"}
    told = [{"eval_time": "20m", "alertname": "AnnealQueueWithoutWorker", "exp_alerts": [alert]}]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({**CASES, "tests": [{**test, "alert_rule_test": told}]}))
    done = tool(tmp_path, "test", "rules", "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_real_server_watches_a_real_service(tmp_path: Path) -> None:
    """It scrapes API and worker, evaluates every rule, answers what the dashboards ask; and nothing is wrong."""
    server, metrics, port = prometheus(), free_port(), free_port()
    with deployment(tmp_path / "home", {"WORKER_METRICS_PORT": str(metrics)}) as found:
        found.start_worker()
        found.wait_ready()
        for name in CASES["rule_files"]:
            shutil.copy(FOLDER / name, tmp_path)
        (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(of_prometheus([found.port], [metrics], "1s")))
        where = [f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
        command = [server, f"--config.file={tmp_path / 'prometheus.yml'}", *where]
        with running(command, log=tmp_path / "prometheus.log", ready=lambda: _evaluated(port), timeout_s=60):
            up = {(r["metric"]["job"], r["value"][1]) for r in asked(port, "query", query="up")["result"]}
            assert up == {("anneal-api", "1"), ("anneal-worker", "1")}
            (workers,) = asked(port, "query", query='anneal:queue_workers{queue="anneal.cpu"}')["result"]
            assert workers["value"][1] == "1"
            groups = asked(port, "rules")["groups"]
            told = [rule for group in groups for rule in group["rules"]]
            assert len(told) == len(rules())
            assert [rule for rule in told if rule["health"] != "ok"] == []
            assert [rule["name"] for rule in told if rule.get("state", "inactive") != "inactive"] == []
            for query in dashboard_queries():
                asked(port, "query", query=query.replace('"$worker"', '".*"'))


def asked(port: int, what: str, **parameters: str) -> dict[str, Any]:
    answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/{what}", params=parameters)
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def _evaluated(port: int) -> bool:
    """Both were scraped, and every rule was evaluated since."""
    try:
        if len(asked(port, "query", query="up == 1")["result"]) < 2:
            return False
        found = asked(port, "query", query="anneal:queue_workers")["result"]
        told = [rule for group in asked(port, "rules")["groups"] for rule in group["rules"]]
    except (httpx.HTTPError, AssertionError):
        time.sleep(0.2)
        return False
    return bool(found) and all(rule["health"] != "unknown" for rule in told)
