"""A whole job on a chain of two models that ships an engine of each: by construction both are faster than the original,
by far, at every batch size and rate."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.factories import onnx_models as models
from tests.factories.deployment import deployment
from tests.factories.pace import paced
from tests.factories.sums import WIDTH, added, seconds_of, sum_of_constants
from tests.factories.waiting_toys_installed import installed

_ADDS = 2000  # of each
_SIZES = [1, 16]
_TOY = "toy-any-graph"

pytestmark = pytest.mark.timeout(300)


@dataclass
class _Ran:
    """A job that ended, and the page of its report. `bundle`: unpacked; `repository`: of the kind triton, likewise."""

    report: dict[str, Any]
    manifest: dict[str, Any]
    page: str
    bundle: Path
    repository: Path


def test_an_ensemble_ships_where_the_engines_win(tmp_path: Path) -> None:
    first, second = sum_of_constants(_ADDS, gives="hidden"), sum_of_constants(_ADDS, takes="hidden", seed=8)
    ran = _run(tmp_path, {"first": first, "second": second})
    _check_report(ran.report)
    _check_traffic(ran.report)
    assert ran.manifest["chain"] == ran.report["chain"]
    assert "An engine of each model ships" in ran.page
    assert f"<td>{_TOY}" in ran.page
    _check_bundle(ran.bundle, added(first) + added(second), tmp_path)
    _check_repository(ran.repository)


def _run(folder: Path, parts: dict[str, Any]) -> _Ran:
    site = installed(folder / "site", sum(map(seconds_of, parts.values())))
    told = {"PYTHONPATH": str(site), "WORKER_STAGE_TIMEOUT_S": "150"}
    with deployment(folder / "home", told) as deployed, deployed.client() as client:
        deployed.start_worker()
        deployed.wait_ready()
        ids = [client.upload_model(models.save(m, folder / f"{n}.onnx"), n)["id"] for n, m in parts.items()]
        job = client.submit(
            {
                "model_id": ids[0],
                "chain": {"then": [{"model_id": i} for i in ids[1:]], "deploy": "ensemble"},
                "benchmark": {"batch_sizes": _SIZES, "min_seconds": 0.1, "allow_noisy": True},
                "target": {"backends": [_TOY]},
                "traffic": {"slo": {"p99_latency_ms": 500}},
                "budget_seconds": max(60, paced(40)),  # what the verdict leaves goes into the traffic
            }
        )
        job = client.wait(job["id"], check=False)
        assert job["status"] == "succeeded", (job["error"], deployed.worker_log()[-4000:])
        bundle = client.download_bundle(job["engine_ids"][0], folder / "bundle.zip")
        archive = client.download_bundle(job["engine_ids"][0], folder / "triton.tar", kind="triton")
        page = httpx.get(f"{deployed.url}/v1/jobs/{job['id']}/report", headers={"Accept": "text/html"}).text
        report, manifest = client.report(job["id"]), client.manifest(job["id"])
    with zipfile.ZipFile(bundle) as packed:
        packed.extractall(folder / "bundle")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "models", filter="data")
    return _Ran(report, manifest, page, folder / "bundle", folder / "models")


def _check_report(report: dict[str, Any]) -> None:
    told = [(c["id"], c["status"], c["reason"]) for c in report["candidates"]]
    assert report["picked"] == f"{_TOY}-sum", (told, report["search"])
    (engine,) = report["candidates"]
    assert engine["backend"] == "chained"
    for size in _SIZES:
        gain = engine["batches"][str(size)]["speedup"]
        assert gain["low"] > 5.0, "the waits of both come to a fiftieth of what the originals take"
    assert report["final_metrics"]["speedup_ci"][0] > 5.0
    chain = report["chain"]
    assert (chain["deploy"], chain["asked"], chain["reason"]) == ("ensemble", "ensemble", None)
    own = [model["engine"] for model in chain["models"]]
    assert [(e["folder"], e["backend"], e["runtime"]) for e in own] == [("part_1", _TOY, {}), ("part_2", _TOY, {})]
    (part,) = report["optimizations_applied"]
    assert part["name"] == "an engine of each model in place of one of the whole"
    assert part["impact"] or part["reason"].startswith("not measured"), "what it costs that they are apart"
    assert report["deployment_config"]["backend"] == "chained"
    assert report["bundles"]["triton"]["backend"] == "ensemble"


def _check_traffic(report: dict[str, Any]) -> None:
    """On a machine that is too busy the time may run out for one or the other; nothing else stands in the way."""
    told, missing = report["traffic"], report["not_explained"]
    late = ("did not end within", "left no time for it", "the time ran out")
    assert all(any(words in why for words in late) for why in missing.values()), missing
    if "cold_start" not in missing:
        assert told["cold_start"]["first_answer_seconds"] > 0
    if "traffic" not in missing:
        pattern = next(row for row in told["patterns"] if row["pattern"] == "ensemble")
        assert pattern["fits"] is True
        gain = told["gain"]
        assert gain is None or gain["low"] is None or gain["low"] > 1.0, "None where it was not proven"


def _check_bundle(bundle: Path, total: Any, scratch: Path) -> None:
    """In a process of its own it answers as the originals do."""
    rng = np.random.default_rng(1)
    asked = rng.integers(-100, 100, (5, WIDTH)).astype(np.float32)
    np.savez(scratch / "asked.npz", input=asked)
    for arguments in ([], [str(scratch / "asked.npz"), str(scratch / "answered.npz")]):
        command = [sys.executable, "-I", "infer.py", *arguments]
        done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with np.load(scratch / "answered.npz") as answered:
        np.testing.assert_array_equal(answered["output"], asked + total)
    told = json.loads((bundle / "manifest.json").read_text())
    assert [m["engine"]["folder"] for m in told["chain"]["models"]] == ["part_1", "part_2"]
    text = (bundle / "README.md").read_text()
    assert f"first: takes `input`; gives `hidden`; its engine, for `{_TOY}`, lies in `part_1/`" in text


def _check_repository(repository: Path) -> None:
    names = sorted(path.name for path in repository.iterdir())
    whole = names[0]
    assert names == [whole, f"{whole}-1", f"{whole}-2"]
    config = (repository / whole / "config.pbtxt").read_text()
    assert 'platform: "ensemble"' in config
    assert config.index(f'model_name: "{whole}-1"') < config.index(f'model_name: "{whole}-2"')
    for name, takes, gives in ((names[1], "input", "hidden"), (names[2], "hidden", "output")):
        own = (repository / name / "config.pbtxt").read_text()
        assert own.index(f'name: "{takes}"') < own.index(f'name: "{gives}"')
        assert (repository / name / "1/sum.npy").exists()
        assert (repository / name / "1/infer.py").exists()
