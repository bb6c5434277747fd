"""Manifests for Kubernetes of a delivered engine: KServe's InferenceService (v2 protocol) around the bundle's own
server, KEDA's ScaledObject, and a monitor and rules for Prometheus. Field names: the custom resource definitions of
KServe (serving.kserve.io/v1beta1), KEDA (keda.sh/v1alpha1) and the Prometheus operator (monitoring.coreos.com/v1).

Rates, memory and limits in them were measured in the job or are the user's own; what needs one that is not known is
left out, and a comment says so. It is texts and a list of which of the bundle's files go where, as for Triton.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.serving.batcher import SECONDS
from workers.serving.launching import SERVER

FOLDER = "kserve"  # of the bundle and of the archive
IMAGE_FOLDER = "image"  # of the archive: what the image is built from
PORT = 8000
_PORT_NAME = "http1"  # as KServe knows it
_MOST_REPLICAS = 10
_ERROR_SHARE, _QUEUE_SHARE = 0.01, 0.8
_TIMEOUT_S = 60.0  # of a request, where the server is not told otherwise
_START_S = 10.0  # between two looks at whether it is ready
_CLIENTS = "cancelled|input_refused|invalid_request|too_large"  # outcomes that are no fault of the server


@dataclass(frozen=True)
class Deployed:
    """An engine that is to be deployed. `memory_mb`: of all processes (10⁶ bytes), by `memory_basis`; `cpus`: that they
    compute on. `pod_resource`: what a pod asks for to have the accelerator. `rate`: requests per second that one server
    was proven to keep its limit at, with `p99_ms`, measured as `rate_basis` says; None where there is none, for this
    `reason`. `rate_interval`: its upper end None where no rate was seen to exceed the limit."""

    name: str
    machine: str
    instances: int
    cpus: int
    memory_mb: float | None
    memory_basis: str
    pod_resource: str | None = None
    rate: float | None = None
    rate_interval: Sequence[float | None] | None = None
    rate_basis: str = ""
    p99_ms: float | None = None
    start_seconds: float | None = None
    reason: str = "the job told no traffic"
    members: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Manifests:
    """`texts`: members for the bundle, by name. `files`: path in the archive → the bundle's member."""

    texts: dict[str, bytes]
    files: dict[str, str]
    notes: list[str]


def manifests(deployed: Deployed) -> Manifests:
    notes = [*_notes(deployed)]
    texts = {"inferenceservice.yaml": _document(_service(deployed), _about_service(deployed))}
    if deployed.rate is not None:
        texts["scaledobject.yaml"] = _document(_scaling(deployed), _about_scaling(deployed))
    texts["podmonitor.yaml"] = _document(_monitor(deployed), iter(()))
    texts["prometheusrule.yaml"] = _document(_rules(deployed), _about_rules(deployed))
    texts["README.md"] = _readme(deployed, notes)
    named = {f"{FOLDER}/{name}": text.encode() for name, text in texts.items()}
    files = {name: name for name in named} | {f"{IMAGE_FOLDER}/{name}": name for name in deployed.members}
    return Manifests(named, files, notes)


def resource_name(name: str) -> str:
    """A name that Kubernetes takes for all of them (RFC 1123's label, with room for KServe's endings)."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    return found if found[:1].isalpha() else f"m-{found}".rstrip("-")


def mebibytes(megabytes: float) -> int:
    """Rounded up, of 10⁶ bytes."""
    return math.ceil(megabytes * 1e6 / (1 << 20))


# The resources.


def _service(deployed: Deployed) -> dict[str, Any]:
    name = resource_name(deployed.name)
    requests: dict[str, Any] = {"cpu": str(deployed.cpus)}
    if deployed.memory_mb is not None:
        requests["memory"] = f"{mebibytes(deployed.memory_mb)}Mi"
    resources: dict[str, Any] = {"requests": requests}
    if deployed.pod_resource is not None:
        resources["limits"] = {deployed.pod_resource: "1"}
    container = {
        "name": "kserve-container",
        "image": f"REGISTRY/{name}:latest",
        "command": ["python", SERVER, *_listens(), *_patience(deployed), "--name", name],
        "env": [{"name": "PROTOCOL", "value": "v2"}],
        "ports": [{"name": _PORT_NAME, "containerPort": PORT, "protocol": "TCP"}],
        "resources": resources,
        "startupProbe": {**_probe("ready"), "failureThreshold": _starts(deployed)},
        "readinessProbe": _probe("ready"),
        "livenessProbe": _probe("live"),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 10001,
        },
    }
    scaled = deployed.rate is not None
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "annotations": {
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "external" if scaled else "none",
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "maxReplicas": _MOST_REPLICAS if scaled else 1,
                "terminationGracePeriodSeconds": 60,
                "containers": [container],
            }
        },
    }


def _listens() -> list[str]:
    return ["--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104 (in a pod)


def _probe(what: str) -> dict[str, Any]:
    return {
        "httpGet": {"path": f"/v2/health/{what}", "port": PORT},
        "periodSeconds": int(_START_S),
        "timeoutSeconds": 5,
    }


def _patience(deployed: Deployed) -> list[str]:
    """The server turns away what takes longer than a minute, unless it is told: a limit that long could not be seen to
    be missed."""
    limit_s = (deployed.p99_ms or 0.0) / 1000
    return ["--timeout", f"{2 * limit_s:g}"] if 2 * limit_s > _TIMEOUT_S else []


def _starts(deployed: Deployed) -> int:
    """Looks until it counts as failed: ten times what it was seen to take, at least five minutes."""
    return max(30, math.ceil(10 * (deployed.start_seconds or 0.0) / _START_S))


def _scaling(deployed: Deployed) -> dict[str, Any]:
    name = resource_name(deployed.name)
    assert deployed.rate is not None
    trigger = {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": "http://prometheus-operated.monitoring.svc:9090",
            "query": _per_second(_pods(deployed), "1m"),
            "threshold": f"{_down(deployed.rate)}",
        },
    }
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"name": f"{name}-predictor"},
            "minReplicaCount": 1,
            "maxReplicaCount": _MOST_REPLICAS,
            "triggers": [trigger],
        },
    }


def _monitor(deployed: Deployed) -> dict[str, Any]:
    name = resource_name(deployed.name)
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name},
        "spec": {
            "selector": {"matchLabels": {"serving.kserve.io/inferenceservice": name}},
            "podMetricsEndpoints": [{"port": _PORT_NAME, "path": "/metrics", "interval": "15s"}],
        },
    }


def _rules(deployed: Deployed) -> dict[str, Any]:
    name = resource_name(deployed.name)
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": name},
        "spec": {
            "groups": [
                {"name": name, "rules": [*_alerts(deployed)]},
                {"name": f"{name}-recorded", "rules": [*_recorded(deployed)]},
            ]
        },
    }


def _alerts(deployed: Deployed) -> Iterator[dict[str, Any]]:
    pods = _pods(deployed)
    if deployed.p99_ms is not None and not _beyond_buckets(deployed.p99_ms):
        bucket = f"sum by (le) (rate(anneal_serve_request_seconds_bucket{pods}[5m]))"
        yield _alert(
            "P99AboveLimit",
            f"histogram_quantile(0.99, {bucket}) > {deployed.p99_ms / 1000:g}",
            f"p99 is above the limit of {deployed.p99_ms:g} ms.",
        )
    failed = _pods(deployed, f'outcome!~"ok|{_CLIENTS}"')
    yield _alert(
        "RequestsFail",
        f"{_per_second(failed)} / {_per_second(pods)} > {_ERROR_SHARE:g}",
        f"More than {100 * _ERROR_SHARE:g} % of the requests are turned away, run out of time or fail.",
    )
    if deployed.rate is not None:
        servers = f"count(anneal_serve_instances_up{pods})"
        yield _alert(
            "Saturated",
            f"{_per_second(pods)} / {servers} > {_down(deployed.rate)}",
            f"Each server gets more than the {_down(deployed.rate)} requests per second that one was measured to serve "
            "within its limit.",
        )
    yield _alert(
        "QueueFills",
        f"anneal_serve_waiting{pods} / anneal_serve_queue_limit{pods} > {_QUEUE_SHARE:g}",
        f"The queue is more than {100 * _QUEUE_SHARE:g} % full: beyond it requests are turned away.",
    )
    yield _alert(
        "InstancesMissing",
        f"anneal_serve_instances_up{pods} < anneal_serve_instances{pods}",
        "Processes of the engine are down.",
    )


def _recorded(deployed: Deployed) -> Iterator[dict[str, Any]]:
    """What to hold against the batch sizes and times that were measured."""
    pods = _pods(deployed)
    for name in ("batch_size", "queue_seconds", "compute_seconds"):
        parts = (f"sum(rate(anneal_serve_{name}_{part}{pods}[5m]))" for part in ("sum", "count"))
        expr, labels = " / ".join(parts), {"service": resource_name(deployed.name)}
        yield {"record": f"anneal_serve:{name}:mean5m", "expr": expr, "labels": labels}


def _beyond_buckets(limit_ms: float) -> bool:
    return limit_ms / 1000 >= SECONDS[-1]


def _alert(name: str, expr: str, summary: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expr,
        "for": "5m",
        "labels": {"severity": "warning"},
        "annotations": {"summary": summary},
    }


def _per_second(pods: str, over: str = "5m") -> str:
    """Requests, also those that are turned away."""
    return f"sum(rate(anneal_serve_requests_total{pods}[{over}]))"


def _pods(deployed: Deployed, more: str = "") -> str:
    told = f'pod=~"{resource_name(deployed.name)}-predictor-.*"'
    return "{" + (f"{told},{more}" if more else told) + "}"


def _down(rate: float) -> float | int:
    """Three digits, rounded down, and no exponent: a target is never above what was measured."""
    digits = 2 - math.floor(math.log10(rate)) if rate > 0 else 0
    found = math.floor(rate * 10**digits) / 10**digits
    return int(found) if found == int(found) else found


# What is said of them.


def _about_service(deployed: Deployed) -> Iterator[str]:
    yield f"Build the image from the folder {IMAGE_FOLDER}/, push it, and name it below in place of REGISTRY/."
    yield f"Measured on {deployed.machine}: {deployed.instances} process(es) of the engine on {deployed.cpus} core(s)."
    if deployed.memory_mb is None:
        yield "No memory is asked for: it was not measured."
    else:
        yield (
            f"Memory: {deployed.memory_mb:.4g} MB were measured ({deployed.memory_basis}). No limit is set: what would "
            "be safe beyond that was not measured."
        )
    if deployed.rate is None:
        yield f"No ScaledObject, one replica: at which rate a server keeps its limit is not known ({deployed.reason})."


def _about_scaling(deployed: Deployed) -> Iterator[str]:
    assert deployed.rate is not None
    low, high = deployed.rate_interval or (None, None)
    least = "at least " if deployed.rate_interval is not None and high is None else ""
    within = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
    limit = f", p99 within {deployed.p99_ms:g} ms" if deployed.p99_ms is not None else ""
    how = f" {deployed.rate_basis}" if deployed.rate_basis else ""
    served = f"{least}{deployed.rate:.4g} requests/s{within}"
    yield f"One server was measured{how} to serve {served}{limit}, under the job's traffic."
    yield "maxReplicaCount is a bound of yours: several of them were not measured together."
    yield "serverAddress and the label `pod` are those of the Prometheus operator's defaults."


def _about_rules(deployed: Deployed) -> Iterator[str]:
    if deployed.p99_ms is None:
        yield f"No rule on p99: no limit was told ({deployed.reason})."
    elif _beyond_buckets(deployed.p99_ms):
        yield (
            f"No rule on p99: the limit of {deployed.p99_ms:g} ms is not below the largest bucket of the server's "
            f"histogram ({SECONDS[-1]:g} s), beyond which Prometheus estimates no quantile."
        )
    else:
        yield "Between the buckets of its histogram (5, 10, 25, 50, 100 ms, ...) Prometheus estimates a quantile."
    if deployed.rate is None:
        yield f"No rule on the rate of requests: what a server keeps its limit at is not known ({deployed.reason})."


def _notes(deployed: Deployed) -> Iterator[str]:
    if deployed.rate is None:
        yield f"No ScaledObject: {deployed.reason}."
    yield from (line for line in _about_service(deployed) if "emory" in line)


def _readme(deployed: Deployed, notes: Sequence[str]) -> str:
    name = resource_name(deployed.name)
    lines = [
        f"# {deployed.name} on Kubernetes",
        "",
        f"    docker build -t REGISTRY/{name}:latest {IMAGE_FOLDER} && docker push REGISTRY/{name}:latest",
        f"    kubectl apply -f {FOLDER}     # after the image's name stands in inferenceservice.yaml",
        "",
        "Needs KServe (0.16 or newer; before, `deploymentMode` was called `RawDeployment`), KEDA for "
        "`scaledobject.yaml`, and the Prometheus operator for `podmonitor.yaml` and `prometheusrule.yaml`. The server "
        f"speaks the Open Inference Protocol v2 at `/v2/models/{name}`, and tells its metrics at `/metrics`.",
        "",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines) + "\n"


def _document(document: Mapping[str, Any], comments: Iterator[str]) -> str:
    return "\n".join([*(f"# {' '.join(line.split())}" for line in comments), *yaml_lines(document)]) + "\n"


def yaml_lines(value: Mapping[str, Any] | Sequence[Any], depth: int = 0) -> Iterator[str]:
    """YAML of nested mappings and lists; scalars as in JSON, which YAML reads."""
    pad = "  " * depth
    items = value.items() if isinstance(value, Mapping) else [("-", item) for item in value]
    for key, item in items:
        lead = f"{pad}{key}" if key == "-" else f"{pad}{_key(key)}:"
        if not isinstance(item, Mapping | list) or not item:
            yield f"{lead} {json.dumps(item, ensure_ascii=False)}"
        elif key == "-":
            first, *rest = yaml_lines(item, depth + 1)
            yield f"{lead} {first.lstrip()}"
            yield from rest
        else:
            yield lead
            yield from yaml_lines(item, depth + 1)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z][\w./-]*", key) else json.dumps(key)
