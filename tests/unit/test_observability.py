"""Metrics, their documentation, rules, dashboards and runbooks name the same things."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.core import Metric

from app.db.base import utcnow
from app.http.metrics import OF_THE_SERVICE, Metrics
from app.operations.statistics import Snapshot, Waiting
from workers.telemetry.metrics import WorkerMetrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "observability.md"
RUNBOOKS = ROOT / "docs" / "runbooks.md"
RULES = sorted((ROOT / "docker" / "prometheus").glob("*.yml"))
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

READING = {"memory_used_bytes": 1.0, "utilization_ratio": 0.5, "temperature_celsius": 50.0}
FULL = Snapshot(
    at=utcnow(),
    jobs={"queued": 1},
    waiting={"q": Waiting(1, utcnow())},
    running={"q": 1},
    workers={"q": 1},
    live_workers=1,
    tenants={("q", "tnt_1"): Waiting(1, utcnow())},
    failed={"bad_model": 2},
)


def told() -> Iterator[Metric]:
    api, worker = Metrics(), WorkerMetrics(lambda: READING)
    api.watch(lambda: FULL)
    yield from api.registry.collect()
    yield from worker.registry.collect()


def labels_of(registry: Any) -> dict[str, tuple[str, ...]]:
    """Of metrics that have no sample yet."""
    return {c._name: tuple(c._labelnames) for c in registry._collector_to_names if hasattr(c, "_labelnames")}


def in_code() -> dict[str, tuple[str, frozenset[str]]]:
    """Name → type and labels."""
    declared = {**labels_of(Metrics().registry), **labels_of(WorkerMetrics().registry)}
    found = {}
    for metric in told():
        name = f"{metric.name}_total" if metric.type == "counter" else metric.name
        sampled = {label for sample in metric.samples for label in sample.labels} - {"le"}
        found[name] = (metric.type, frozenset(declared.get(metric.name, tuple(sampled))))
    return found


def in_docs() -> dict[str, tuple[str, frozenset[str]]]:
    rows = re.findall(r"^\| `(anneal_\w+)` \| (\w+) \|([\w, ]*)\|", DOCS.read_text(), re.MULTILINE)
    return {name: (kind, frozenset(filter(None, labels.strip().split(", ")))) for name, kind, labels in rows}


def series() -> set[str]:
    """Every name that a query may ask for."""
    suffixes = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    return {f"{name}{suffix}" for name, (kind, _) in in_code().items() for suffix in suffixes[kind]}


def rules() -> list[dict[str, Any]]:
    files = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for file in files for group in file.get("groups", ()) for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    found = []
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            found += [target["expr"] for target in panel.get("targets", ())]
    return found


def test_the_documentation_has_every_metric_as_it_is() -> None:
    assert in_docs() == in_code()


def test_names_follow_the_conventions() -> None:
    units = ("_seconds", "_bytes", "_ratio", "_celsius")
    for name, (kind, _) in in_code().items():
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith(units), name
        assert "milliseconds" not in name


def test_rules_and_dashboards_ask_for_what_there_is() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    queries = [*(rule["expr"] for rule in rules()), *dashboard_queries()]
    assert len(DASHBOARDS) == 2
    assert len(queries) > 60
    asked = {name for query in queries for name in re.findall(r"(?<![\w:])anneal[_:][\w:]+", query)}
    assert asked - series() - recorded == set()
    assert recorded <= asked, "recorded for nobody"


def test_queries_name_labels_that_there_are() -> None:
    of = {name: labels for name, (_, labels) in in_code().items()}
    always = {"instance", "job", "le"}
    for query in [*(rule["expr"] for rule in rules()), *dashboard_queries()]:
        for name, matchers in re.findall(r"(anneal_\w+)\{([^}]*(?:\{job_id\}[^}]*)?)\}", query):
            base = re.sub(r"_(bucket|sum|count)$", "", name)
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", re.sub(r'"[^"]*"', '""', matchers)))
            assert asked <= of[name if name in of else base] | always, query


def test_every_alert_has_its_runbook() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    sections = re.split(r"^## ", RUNBOOKS.read_text(), flags=re.MULTILINE)[1:]
    written = {section.splitlines()[0]: section for section in sections}
    assert list(written) == list(alerts), "in the order of the alerts"
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook"] == f"docs/runbooks.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")
        for part in ("**Means**", "**Look**", "**Do**"):
            assert part in written[name], f"{name}: {part}"


def test_the_alert_on_the_service_s_own_failures_knows_them_all() -> None:
    (rule,) = (rule for rule in rules() if rule.get("alert") == "AnnealServiceFailsJobs")
    watched = re.findall(r'code=~"([^"]+)"', rule["expr"])[0].split("|")
    assert sorted(watched) == sorted(OF_THE_SERVICE)
    from workers.attempts import RETRIED_LATER

    assert set(OF_THE_SERVICE) >= RETRIED_LATER


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_can_be_provisioned(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem
    assert board.get("id") is None
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
            assert panel["description"], panel["title"]
