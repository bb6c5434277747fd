"""The examples for Prefect and Dagster, each run by its platform on a service that runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.conftest import CLIENT, KEPT, MISSED, Service, asked
from tests.integrations.environments import REPOSITORY

EXAMPLES = REPOSITORY / "examples" / "platforms"

pytestmark = pytest.mark.timeout(400)  # with installing


def told_by(platform: str, service: Service, folder: Path, **variables: str) -> dict[str, Any]:
    check = Path(__file__).with_name(f"{platform}_check.py")
    arguments = (service.url, service.model, folder, json.dumps(KEPT), json.dumps(MISSED))
    variables |= {
        "PYTHONPATH": f"{CLIENT}:{EXAMPLES}",
        "HOME": str(folder),
        "DO_NOT_TRACK": "1",
        "ANNEAL_URL": service.url,
    }
    return asked(platform, check, *arguments, variables=variables, timeout_s=200)


def test_a_flow_of_prefect_deploys_what_keeps_the_promise_and_nothing_else(service: Service, tmp_path: Path) -> None:
    told = told_by(
        "prefect", service, tmp_path, PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_SERVER_ANALYTICS_ENABLED="false"
    )
    assert told["bundle"] == str(tmp_path / "bundle.zip")
    assert zipfile.is_zipfile(told["bundle"])
    assert told["figures"]["speedup"] > 1
    again = told["again"]
    assert (again["state"], again["away"]) == ("Completed", []), again
    assert len(again["deployed"]) == 2
    assert len(set(again["deployed"])) == 1
    assert again["jobs"] == 1, "a flow that is run again waits for the job that it has"
    assert told["missed"][0] == "FAILED"
    assert "size_mb" in told["missed"][1], told["missed"]
    assert told["nothing"] == ["COMPLETED", "NothingFaster"]
    assert told["tried again"] == ["ConnectionFailed"]
    assert told["hosts"] == []


def test_assets_of_dagster_stop_at_the_check_where_the_promise_is_not_kept(service: Service, tmp_path: Path) -> None:
    told = told_by("dagster", service, tmp_path, DAGSTER_HOME="")
    kept = told["kept"]
    assert kept["success"], kept
    assert kept["checks"] == {"promise_is_kept": True}
    assert kept["made"] == ["trained_model", "request", "optimization", "engine", "deployed_bundle"]
    assert kept["metadata"]["speedup"] > 1
    assert kept["metadata"]["report"].startswith(f"{service.url}/v1/jobs/job_")
    assert zipfile.is_zipfile(tmp_path / "bundle.zip")
    missed = told["missed"]
    assert not missed["success"]
    assert missed["made"] == ["trained_model", "request", "optimization"]
    assert "size_mb" in missed["failures"][0], missed
    assert told["refused"]["made"] == ["trained_model"]
    assert told["refused"]["retries"] == missed["retries"] == 0, "what is refused is refused again"
    assert told["gated"] == {"success": False, "made": ["engine"], "deployed": False}
    assert told["hosts"] == []
