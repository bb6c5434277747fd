"""The typed answers are those of openapi.json, and are the dicts that came."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import pytest

from anneal_client import models, reports
from anneal_client.models import Capabilities, Job, Tensor

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "clients" / "python"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", CLIENT / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_they_are_made_of_the_committed_document(generate: ModuleType) -> None:
    document = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    for name, text in generate.generated(document).items():
        committed = (CLIENT / "anneal_client" / name).read_text(encoding="utf-8")
        assert committed == text, "run: python clients/python/generate.py"


def test_every_answer_has_a_type(generate: ModuleType) -> None:
    document = json.loads((ROOT / "openapi.json").read_text(encoding="utf-8"))
    for name in generate.reachable(document["components"]["schemas"], generate.answers_of(document)):
        kind = generate.client_name(name)
        if not name.endswith("Page") and not hasattr(models, kind) and not hasattr(reports, kind):
            assert name in set(generate.reachable(document["components"]["schemas"], generate.SENT)), name


def test_members_are_attributes() -> None:
    sent = {
        "id": "job_1",
        "created_at": "2026-11-29T20:00:00.5Z",
        "error": {"code": "x", "detail": "y", "further": 1},
        "stages": [{"name": "export", "status": "running", "started_at": None}],
        "spec": {"model_id": "mdl_1"},
        "later": [1],
    }
    job = Job(sent)
    assert job == sent
    assert job["created_at"] == "2026-11-29T20:00:00.5Z"
    assert job.created_at == datetime(2026, 11, 29, 20, 0, 0, 500_000, UTC)
    assert job.error is not None
    assert (job.error.code, job.error.remedy, job.error["further"]) == ("x", None, 1)
    assert [(s.name, s.cached, s.started_at) for s in job.stages] == [("export", False, None)]
    assert (job.children, job.parent_id, job.expected_end) == ([], None, None)
    assert job["later"] == [1]
    assert json.loads(json.dumps(job)) == sent
    assert copy.deepcopy(job) == pickle.loads(pickle.dumps(job)) == job
    assert "engine_ids" in dir(job)
    with pytest.raises(AttributeError, match="sent no 'engine_ids'"):
        _ = job.engine_ids
    with pytest.raises(AttributeError, match="no member 'later'"):
        _ = job.later  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        job.status = "failed"


def test_lists_of_objects_and_unlike_values() -> None:
    answer = Capabilities(workers=[{"id": "w", "hardware": {"cores": 2}, "last_seen_at": "2026-11-29T20:00:00Z"}])
    assert answer.workers[0].last_seen_at.year == 2026
    assert answer.workers[0].plugins == []
    assert Tensor(name="x", dtype="float32", shape=["batch", 3, None]).shape == ["batch", 3, None]
    assert Capabilities(workers=None).workers is None, "as it came, whatever came"
