"""The component of `clients/kubeflow` in a pipeline, run by kfp's own SubprocessRunner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.integrations.conftest import CLIENT, KEPT, MISSED, Service, asked
from tests.integrations.environments import REPOSITORY, environment

CHECK = Path(__file__).with_name("kubeflow_check.py")

pytestmark = pytest.mark.timeout(200)


def test_a_pipeline_hands_on_the_engine_and_fails_where_the_promise_is_not_kept(
    service: Service, tmp_path: Path
) -> None:
    paths = f"{CLIENT}:{REPOSITORY / 'clients' / 'kubeflow'}"
    binaries = environment("kubeflow") / "bin"
    variables = {"PYTHONPATH": paths, "PATH": f"{binaries}:/usr/bin:/bin"}
    told = asked(
        *("kubeflow", CHECK, service.url, service.model, tmp_path, json.dumps(KEPT), json.dumps(MISSED)),
        variables=variables,
    )
    assert told["promise"] in ("kept", "unproven"), "unproven where this machine is busy"
    assert told["speedup"] > 1
    assert told["metrics"]["speedup"] == told["speedup"]
    assert (told["metadata"]["job_id"], told["metadata"]["backend"]) == (told["job_id"], "toy")
    assert told["report"].lstrip().lower().startswith("<!doctype html")
    assert "infer.py" in told["names"]
    assert "optimize" in (told["failed"] or ""), "the task fails where no engine keeps the limits"
    pipeline = yaml.safe_load((tmp_path / "release.yaml").read_text())
    assert {"comp-train", "comp-optimize", "comp-look"} <= set(pipeline["components"])
