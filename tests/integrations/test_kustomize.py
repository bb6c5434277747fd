"""The Kustomize base and its overlays, rendered by Kustomize itself and checked by the published schemas."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integrations.environments import REPOSITORY, NoSystemPackage
from tests.integrations.test_kubernetes import check

FOLDER = REPOSITORY / "docker" / "kubernetes"
OVERLAYS = ("dev", "production")
IMAGES = {"anneal-api", "anneal-worker", "anneal-worker-cuda"}


def rendered(folder: Path) -> str:
    command = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(command[0]) is None:
        raise NoSystemPackage("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "what is deprecated is said there"
    return done.stdout


def objects(overlay: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all(rendered(FOLDER / "overlays" / overlay))]


def pods(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o["spec"]["template"] for o in found if o["kind"] in ("Deployment", "Job")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_fit_the_published_schemas(overlay: str, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(rendered(FOLDER / "overlays" / overlay))
    done = check(path)
    assert done.returncode == 0, done.stdout + done.stderr
    path.write_text(path.read_text().replace("readOnlyRootFilesystem:", "readOnlyRootFileSystem:"))
    assert check(path).returncode == 1, "the check sees a field that there is not"


def test_what_each_overlay_has() -> None:
    dev, production = objects("dev"), objects("production")
    assert {o["metadata"]["namespace"] for o in dev} == {"anneal-dev"}
    assert {o["metadata"]["namespace"] for o in production} == {"anneal"}
    assert {*pods(dev)} == {"anneal-api", "anneal-migrate", "anneal-worker-cpu"}
    assert {*pods(production)} == {*pods(dev), "anneal-worker-cuda"}
    kinds = [o["kind"] for o in production]
    assert (kinds.count("PodDisruptionBudget"), kinds.count("NetworkPolicy"), kinds.count("PodMonitor")) == (3, 4, 2)
    assert [o for o in dev if o["kind"] == "PodDisruptionBudget"] == []
    replicas = {o["metadata"]["name"]: o["spec"]["replicas"] for o in production if o["kind"] == "Deployment"}
    assert replicas == {"anneal-api": 3, "anneal-worker-cpu": 3, "anneal-worker-cuda": 1}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_find_their_pods(overlay: str) -> None:
    found = objects(overlay)
    labels = [pod["metadata"]["labels"] for pod in pods(found).values()]
    ports = {p["name"] for pod in pods(found).values() for c in pod["spec"]["containers"] for p in c.get("ports", ())}
    for o in found:
        spec = o.get("spec", {})
        selector = spec.get("selector") or spec.get("podSelector")
        if selector is None:
            continue
        wanted = selector if o["kind"] == "Service" else selector.get("matchLabels", {})
        assert any(wanted.items() <= told.items() for told in labels), o["metadata"]["name"]
        for expression in selector.get("matchExpressions", ()):
            assert set(expression["values"]) == {told["app"] for told in labels}, "no pod is left open"
        for port in (*spec.get("ports", ()), *spec.get("podMetricsEndpoints", ())):
            assert port.get("targetPort", port.get("port")) in ports


def goes(policies: list[dict[str, Any]], app: str, port: int, *, address: str | None) -> bool:
    """Whether a policy lets a pod of this app reach the port at an address outside of the cluster; None: of any pod in
    it."""

    def to(peer: dict[str, Any]) -> bool:
        if address is None:
            return peer.get("namespaceSelector") == {}
        block = peer.get("ipBlock")
        if block is None:
            return False
        at = ip_address(address)
        return at in ip_network(block["cidr"]) and not any(at in ip_network(e) for e in block.get("except", ()))

    def chosen(selector: dict[str, Any]) -> bool:
        named = [v for e in selector.get("matchExpressions", ()) for v in e["values"]]
        return app in (named or [selector["matchLabels"]["app"]])

    rules = [rule for p in policies if chosen(p["spec"]["podSelector"]) for rule in p["spec"].get("egress", ())]
    assert all(rule.get("to") and rule.get("ports") for rule in rules), "a rule without is one for everywhere"
    return any(port == p["port"] and any(map(to, rule["to"])) for rule in rules for p in rule["ports"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_reach_what_the_page_says_and_nothing_else(overlay: str) -> None:
    policies = [o for o in objects(overlay) if o["kind"] == "NetworkPolicy"]
    public, private = ("93.184.216.34",), ("10.1.2.3", "172.20.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1")
    ports = (22, 80, 443, 4318, 5432, 6379, 8000, 8333, 9464)
    for app in ("anneal-api", "anneal-worker", "anneal-migrate"):
        open_to = {port for port in ports for a in public if goes(policies, app, port, address=a)}
        assert open_to == ({80, 443} if app == "anneal-worker" else {443}), app
        assert not [(a, port) for port in ports for a in private if goes(policies, app, port, address=a)], app
        assert {p for p in ports if goes(policies, app, p, address=None)} == {4318, 5432, 6379, 8333}, app


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_and_carry_no_secret(overlay: str) -> None:
    found = objects(overlay)
    assert [o for o in found if o["kind"] == "Secret"] == []
    for name, pod in pods(found).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            image, _, tag = container["image"].partition(":")
            assert image in IMAGES
            assert re.fullmatch(r"\d[\w.-]*", tag), "a version, not a moving tag"
            assert {"secretRef": {"name": "anneal"}} in container["envFrom"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_reads_what_it_is_given(overlay: str) -> None:
    """Every name that the manifests set is one that the settings read."""
    found = objects(overlay)
    (settings,) = (o["data"] for o in found if o["kind"] == "ConfigMap")
    told = dict(settings)
    for pod in pods(found).values():
        for container in pod["spec"]["containers"]:
            told |= {v["name"]: v.get("value", "from-the-pod") for v in container.get("env", ())}
    script = """
import json, os
from app.settings import load_settings
s = load_settings()
w = s.worker
print(json.dumps([s.host, s.port, str(s.home), s.keys_required, s.log_json, s.limits.connections_per_address,
    w.metrics_host, w.metrics_port, str(w.lock_dir), s.drain_s, w.name]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PATH": os.environ["PATH"], **told},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    read = json.loads(done.stdout)
    expected = ["0.0.0.0", 8000, "/var/lib/anneal", True, True, 0, "0.0.0.0", 9464, "/var/lib/anneal-locks", 7]
    assert read == [*expected, "from-the-pod"]
    assert len(told) == len(read), f"a name that nobody reads: {sorted(told)}"
