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
    "p99_limit_ms": 20.0,
    "memory_mb": 300.0,
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
    rules = {rule["alert"]: rule["expr"] for rule in read(found, "prometheusrule")["spec"]["groups"][0]["rules"]}
    assert rules["P99AboveLimit"].endswith("> 0.02")
    assert rules["Saturated"].endswith("> 163")


@pytest.mark.parametrize(
    ("deployment", "memory", "cpu", "reason"),
    [
        ({}, "96Mi", "3", "the job told no traffic"),
        ({"memory_mb": 210.0, "reasons": {"serving": "the budget ended"}}, "201Mi", "3", "the budget ended"),
        ({"serving": {**TRAFFIC, "goodput": 0.0}}, "287Mi", "2", "the job told no traffic"),
    ],
    ids=["one process", "sweep", "no rate keeps the limit"],
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


def test_a_bundle_without_a_server_has_no_such_kind(tmp_path: Path) -> None:
    assert kinds(tmp_path, {}, ("infer.py",)).entries["kserve"] == {"reason": "The bundle has no server of its own."}


def test_names_numbers_and_text() -> None:
    assert [resource_name(n) for n in ("A_b.c-", "9-x", "é", "x" * 70)] == ["a-b-c", "m-9-x", "m", "x" * 40]
    assert [mebibytes(n) for n in (1.0, 1.048576, 100.0)] == [1, 1, 96]
    value = {"a": [], "b": [{"c": 1, "d": ["x: y", True]}, {"e": {}}], "f g": 'he said "no" # not a comment', "h": None}
    assert yaml.safe_load("\n".join(yaml_lines(value))) == value
