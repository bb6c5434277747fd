"""The kind `kserve` of a bundle; `tests/integrations` holds its manifests against the published schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.factories import onnx_models as models
from tests.factories.bundled import Notes
from workers.kernel import backends
from workers.serving.bundles import Bundled, Kinds, other_kinds
from workers.serving.kserve import mebibytes, resource_name, yaml_lines

TRAFFIC = {
    "settings": {"instances": 2, "threads": 1, "max_batch": 8, "max_delay_ms": 2.0},
    "goodput": 163.49,
    "goodput_interval": [150.2, 170.9],
    "goodput_proven": True,
    "p99_limit_ms": 20.0,
    "memory_mb": 300.0,
    "memory_of": "server",
    "start_seconds": 60.0,
}


def kinds(folder: Path, deployment: dict[str, Any], texts: tuple[str, ...] = ("serve.py", "infer.py")) -> Kinds:
    backend, engine = backends()["onnxruntime"](), folder / "engine"
    engine.mkdir(parents=True)
    built = backend.build(models.folder(models.mlp(), folder / "model"), engine, {}, Notes())
    session = backend.load(engine, built["runtime"])
    settings = (deployment.get("serving") or {}).get("settings") or {"instances": 1, "threads": None, "max_batch": 1}
    try:
        return other_kinds(
            Bundled(
                name="My Model-fp32",
                backend=backend,
                engine=engine,
                runtime=built["runtime"],
                manifest={"deployment": deployment, "figures": {"memory_mb": 100.0}},
                hardware={"cores": 3},
                session=session,
                sample={"input": np.zeros((1, 8), np.float32)},
                batched=True,
                serving=settings,
                texts=dict.fromkeys(texts, b""),
                versions={},
            )
        )
    finally:
        session.close()


def read(found: Kinds, name: str) -> Any:
    return yaml.safe_load(found.texts[f"kserve/{name}.yaml"])


def test_what_was_measured_under_traffic_stands_in_the_manifests(tmp_path: Path) -> None:
    found = kinds(tmp_path, {"serving": TRAFFIC, "memory_mb": 200.0})
    files = found.entries["kserve"]["files"]
    assert {"image/serve.py": "serve.py", "image/model.onnx": "model.onnx"}.items() <= files.items()
    assert {name for name in files if name.startswith("kserve/")} <= found.texts.keys()
    assert not any(name.startswith("image/triton") for name in files)
    predictor = read(found, "inferenceservice")["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["resources"]["requests"] == {"cpu": "2", "memory": "287Mi"}
    assert container["startupProbe"]["failureThreshold"] == 60, "ten times 60 s, in looks of 10 s"
    assert container["env"] == [{"name": "PROTOCOL", "value": "v2"}]
    assert container["command"][-1] == "my-model-fp32"
    (trigger,) = read(found, "scaledobject")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "163", "never above what was measured"
    alerts, recorded = (group["rules"] for group in read(found, "prometheusrule")["spec"]["groups"])
    rules = {rule["alert"]: rule["expr"] for rule in alerts}
    means = [f"anneal_serve:{name}:mean5m" for name in ("batch_size", "queue_seconds", "compute_seconds")]
    assert [rule["record"] for rule in recorded] == means
    assert rules["P99AboveLimit"].endswith("> 0.02")
    assert rules["Saturated"].endswith("> 163")


@pytest.mark.parametrize(
    ("deployment", "memory", "cpu", "reason"),
    [
        ({}, "96Mi", "3", "the job told no traffic"),
        ({"memory_mb": 210.0, "reasons": {"serving": "the budget ended"}}, "201Mi", "3", "the budget ended"),
        ({"serving": {**TRAFFIC, "goodput": 0.0}}, "287Mi", "2", "no rate keeps p99 within 20.0 ms"),
        (
            {"serving": {**TRAFFIC, "goodput_proven": False}},
            "287Mi",
            "2",
            "about 163.5 requests/s were seen in the batcher's own process, which HTTP comes on top of, to keep p99 "
            "within 20.0 ms, and that was not proven",
        ),
        (
            {"serving": {**TRAFFIC, "goodput_over_http": 120.0, "goodput_over_http_interval": [120.0, 130.0]}},
            "287Mi",
            "2",
            "about 120 requests/s were seen over HTTP to keep p99 within 20.0 ms, and that was not proven",
        ),
    ],
    ids=["one process", "sweep", "no rate keeps the limit", "not proven", "not proven over HTTP"],
)
def test_without_a_measured_rate_nothing_scales(
    tmp_path: Path, deployment: dict[str, Any], memory: str, cpu: str, reason: str
) -> None:
    found = kinds(tmp_path, deployment)
    assert "kserve/scaledobject.yaml" not in found.texts
    service = read(found, "inferenceservice")
    assert service["spec"]["predictor"]["maxReplicas"] == 1
    assert service["spec"]["predictor"]["containers"][0]["resources"]["requests"] == {"cpu": cpu, "memory": memory}
    assert found.entries["kserve"]["notes"][0] == f"No ScaledObject: {reason}."


@pytest.mark.parametrize(
    ("traffic", "words"),
    [
        ({}, "to serve 163.5 requests/s [150.2, 170.9], p99"),
        ({"goodput_interval": [163.49, None]}, "to serve at least 163.5 requests/s, p99"),
        ({"goodput_interval": None}, "to serve 163.5 requests/s, p99"),
        (
            {"goodput_over_http": 120.0, "goodput_over_http_interval": [120.0, None], "goodput_over_http_proven": True},
            "One server was measured over HTTP to serve at least 120 requests/s, p99",
        ),
    ],
    ids=["known", "no end", "no interval", "over HTTP"],
)
def test_a_rate_and_its_interval_are_of_one_measurement(tmp_path: Path, traffic: dict[str, Any], words: str) -> None:
    """Also where no rate was seen to exceed the limit: "at least"."""
    scaled = kinds(tmp_path, {"serving": {**TRAFFIC, **traffic}}).texts["kserve/scaledobject.yaml"].decode()
    assert words in scaled


@pytest.mark.parametrize(("limit_ms", "alerts", "command"), [(40_000.0, True, True), (300_000.0, False, True)])
def test_a_limit_beyond_the_server_s_histogram_has_no_rule(
    tmp_path: Path, limit_ms: float, alerts: bool, command: bool
) -> None:
    found = kinds(tmp_path, {"serving": {**TRAFFIC, "p99_limit_ms": limit_ms}})
    told = found.texts["kserve/prometheusrule.yaml"].decode()
    assert ("P99AboveLimit" in told) is alerts
    assert ("not below the largest bucket of the server's histogram (300 s)" in told) is not alerts
    (container,) = read(found, "inferenceservice")["spec"]["predictor"]["containers"]
    assert ("--timeout" in container["command"]) is command, "or no answer would be seen to be that late"


def test_what_the_memory_is_of_is_said(tmp_path: Path) -> None:
    for number, (of, words) in enumerate(
        [("server", "of the server and the engine's processes under"), ("instances", "without the server, under")]
    ):
        found = kinds(tmp_path / str(number), {"serving": {**TRAFFIC, "memory_of": of}})
        assert words in found.texts["kserve/inferenceservice.yaml"].decode()


def test_a_bundle_without_a_server_has_no_such_kind(tmp_path: Path) -> None:
    assert kinds(tmp_path, {}, ("infer.py",)).entries["kserve"] == {"reason": "The bundle has no server of its own."}


def test_names_numbers_and_text() -> None:
    assert [resource_name(n) for n in ("A_b.c-", "9-x", "é", "x" * 70)] == ["a-b-c", "m-9-x", "m", "x" * 40]
    assert [mebibytes(n) for n in (1.0, 1.048576, 100.0)] == [1, 1, 96]
    value = {"a": [], "b": [{"c": 1, "d": ["x: y", True]}, {"e": {}}], "f g": 'he said "no" # not a comment', "h": None}
    assert yaml.safe_load("\n".join(yaml_lines(value))) == value
