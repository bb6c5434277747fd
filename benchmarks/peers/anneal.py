"""Anneal as a user has it: a job over HTTP on the embedded default, and the bundle that comes back."""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from make_models import Case

from anneal_client import Client, Event

Json = dict[str, Any]


class JobEnded(Exception):
    """The job did not succeed."""


def run_job(client: Client, files: Case, note: Any = None, **fields: Any) -> tuple[Json, Json, float]:
    """(job, report, seconds from the upload's begin to the end of the job). `fields` go into the spec."""
    started = time.perf_counter()
    model = client.upload_model(files.model, files.name)
    calibration, validation = client.upload_dataset(files.calibration), client.upload_dataset(files.validation)
    spec: Json = {
        "model_id": model["id"],
        "objective": "latency",
        "shapes": files.shapes,
        "calibration": {"dataset_id": calibration["id"]},
        "validation": {"dataset_id": validation["id"], "metric": files.metric, "max_accuracy_loss_percent": 1.0},
        **({"inputs": {n: {"batch_axis": axis} for n, axis in files.axes.items()}} if files.axes else {}),
        **fields,
    }
    job = client.wait(client.submit(spec)["id"], on_event=note, check=False)
    seconds = time.perf_counter() - started
    if job["status"] != "succeeded":
        raise JobEnded(f"the job {job['status']}: {job['error']}")
    return job, client.report(job["id"]), seconds


def fetch_bundle(client: Client, job: Mapping[str, Any], folder: Path) -> Json:
    """Unpack the job's bundle into `folder`; answers what the runner loads."""
    archive = client.download_bundle(job["engine_ids"][0], folder / "bundle.zip")
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(folder / "bundle")
    archive.unlink()
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    return {
        "kind": "bundle",
        "file": str(folder / "bundle"),
        "backend": manifest["engine"]["backend"],
        "facts": {k: manifest["engine"].get(k) for k in ("candidate", "backend", "precision", "runtime")},
    }


def short(event: Event) -> str | None:
    """A line for a stage that ended, else None."""
    data = event.data
    if event.type != "stage" or data.get("status") not in ("succeeded", "failed") or data.get("cached"):
        return None
    what = " · ".join(str(data[k]) for k in ("stage", "candidate") if data.get(k))
    return f"    {what:<40} {data['status']:<10} {data.get('seconds') or 0:7.1f} s"
