"""Models as users bring them, each a job of one embedded service: the engine that ships answers every held-out input as
the original does, at its own batch sizes and lengths and in any order of calls, or the job says why there is none."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from anneal_client import Client
from tests.factories import cases_engines  # noqa: F401  (registers its own)
from tests.factories.cases import CASES, Feeds, ModelCase, without_node_names
from tests.factories.deployment import deployment
from tests.factories.pace import paced

pytestmark = pytest.mark.timeout(300)

# Loads the bundle anew for each order of calls, by the bundle's own script, and writes every answer.
_ASK = """
import json, sys
import numpy as np
sys.path.insert(0, ".")
import infer
held, orders = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for i, order in enumerate(orders):
    names, run = infer.load()
    for label in order:
        arrays = dict(np.load(held[label]))
        np.savez(f"{label}.{i}.npz", **run({name: arrays[name] for name in names}))
"""
_ORDERS = 4


class Jobs:
    """All cases, submitted at once; the worker takes them one by one."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.cases = {name: build() for name, build in CASES.items()}
        self._ids = {name: self._submit(case) for name, case in self.cases.items()}

    def _submit(self, case: ModelCase) -> str:
        (self.folder / case.name).mkdir()
        onnx.save(case.model, self.folder / case.name / "model.onnx")
        spec: dict[str, Any] = {
            "model_id": self.client.upload_model(self.folder / case.name / "model.onnx")["id"],
            # What looks the fastest ships, however busy the machine is: its answers are what is looked at here.
            "benchmark": {"batch_sizes": [1, 4], "min_seconds": 0.1, "allow_noisy": True},
            "engines_per_bundle": 1,
            "budget_seconds": paced(10),
        }
        if case.data is not None:
            np.savez(self.folder / case.name / "data.npz", **case.data)  # type: ignore[arg-type]
            data = self.client.upload_dataset(self.folder / case.name / "data.npz")["id"]
            spec |= {"calibration": {"dataset_id": data}, "validation": {"dataset_id": data}}
        return str(self.client.submit({**spec, **case.spec})["id"])

    def end(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """The job, ended, and its report."""
        job = self.client.wait(self._ids[name], check=False)
        if (job["error"] or {}).get("code") == "budget_too_small":  # a machine that is slow today: as its remedy says
            again = self.client.submit({**job["spec"], "budget_seconds": 120})
            job = self.client.wait(again["id"], check=False)
        return job, self.client.report(job["id"]) if job["status"] == "succeeded" else {}

    def bundle(self, name: str, job: dict[str, Any]) -> Path:
        (engine,) = job["engine_ids"]
        path = self.client.download_bundle(engine, self.folder / name / "bundle.zip")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(self.folder / name / "bundle")
        return self.folder / name / "bundle"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("cases")
    with deployment(folder / "home") as service:
        service.start_hurried_worker()
        service.wait_ready()
        with service.client() as client:
            yield Jobs(client, folder)


def _original(case: ModelCase, feeds: Feeds) -> Feeds:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    model = without_node_names(case.model).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def _check_answers(case: ModelCase, bundle: Path) -> None:
    held = {}
    for label, feeds in case.held.items():
        held[label] = str(bundle.parent / f"{label}.npz")
        np.savez(held[label], **feeds)  # type: ignore[arg-type]
    orders = list(itertools.islice(itertools.permutations(held), 0, None, max(1, _factorial(len(held)) // _ORDERS)))
    command = [sys.executable, "-c", _ASK, json.dumps(held), json.dumps(orders)]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    limit = 1e-3 if case.data is None else 0.1  # engines that are not exact may ship where data judged them
    for label, feeds in case.held.items():
        wanted = _original(case, feeds)
        for i, order in enumerate(orders):
            found = np.load(bundle / f"{label}.{i}.npz")
            assert set(found.files) == set(wanted)
            for name, a in wanted.items():
                where = f"{name} of {label}, called in the order {order}"
                assert found[name].shape == a.shape, where
                assert found[name].dtype == a.dtype, where
                if case.random:
                    continue
                error = float(np.linalg.norm(found[name].astype(np.float64) - a))
                assert error <= limit * float(np.linalg.norm(a.astype(np.float64))) + 1e-6, where


def _factorial(n: int) -> int:
    return n * _factorial(n - 1) if n > 1 else 1


@pytest.mark.parametrize("name", CASES)
def test_the_engine_answers_as_the_original_does(jobs: Jobs, name: str) -> None:
    job, report = jobs.end(name)
    assert job["status"] == "succeeded", job["error"]
    assert report["picked"]
    assert not [c for c in report["candidates"] if "internal" in str(c["reason"])]
    if jobs.cases[name].random:
        assert (report["picked"], report["candidates"]) == ("baseline", [])
        assert "random" in report["recommendations"][0]
    _check_answers(jobs.cases[name], jobs.bundle(name, job))
