"""A flow of Prefect 3: optimizes a model, and deploys the engine where the promise is kept.

ANNEAL_URL=http://127.0.0.1:8000 python prefect_flow.py model.onnx data.npz
"""

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.runtime import task_run
from prefect.states import Completed, Failed
from prefect.tasks import exponential_backoff

from anneal_client import Client, ConnectionFailed, Unavailable
from anneal_client.figures import metrics_of, promise_of, ships


def anneal() -> Client:
    return Client(os.environ.get("ANNEAL_URL", "http://127.0.0.1:8000"), os.environ.get("ANNEAL_API_KEY"))


def is_away(_task, _run, state) -> bool:
    """Another try helps where nobody answers; a model that is refused is refused again."""
    try:
        state.result()
    except (ConnectionFailed, Unavailable):
        return True
    except Exception:
        return False
    return False


PATIENT = {"retries": 5, "retry_delay_seconds": exponential_backoff(2), "retry_condition_fn": is_away}
KEPT = {**PATIENT, "persist_result": True}  # a flow run that is tried again goes on with the job that it has


@task(**KEPT)
def upload(model: Path, data: Path | None, spec: dict[str, Any]) -> dict[str, Any]:
    with anneal() as client:
        asked = {**spec, "model_id": client.upload_model(model).id}
        if data is not None:
            dataset = {"dataset_id": client.upload_dataset(data).id}
            asked |= {part: {**spec.get(part, {}), **dataset} for part in ("calibration", "validation")}
    return asked


@task(**KEPT)
def submit(asked: dict[str, Any]) -> str:
    with anneal() as client:
        return client.submit(asked, idempotency_key=task_run.id).id  # another try of this task gets the same job


@task(**PATIENT)
def outcome(job_id: str) -> dict[str, Any]:
    with anneal() as client:
        job = client.wait(job_id)  # JobFailed says why, and what helps
        report = client.report(job_id)
    figures = metrics_of(report)
    rows = [{"figure": name, "value": value} for name, value in figures.items()]
    create_table_artifact(rows, key="anneal", description=f"What {job_id} measured")
    return {"job_id": job_id, "engine_id": job.engine_ids[0], "promise": promise_of(job, report), "figures": figures}


@task(**PATIENT)
def deploy(engine_id: str, bundle: Path) -> Path:
    with anneal() as client:
        return client.download_bundle(engine_id, bundle)  # and from here to where it serves


@flow
def release(
    model: Path, data: Path | None = None, spec: dict[str, Any] | None = None, bundle: Path = Path("bundle.zip")
):
    found = outcome(submit(upload(model, data, spec or {})))
    if found["promise"] == "nothing_faster":
        return Completed(name="NothingFaster", message=f"{found['job_id']}: what serves today goes on serving")
    if not ships(found["promise"]):
        return Failed(message=f"{found['job_id']}: {found['promise']}")
    return deploy(found["engine_id"], bundle)


if __name__ == "__main__":
    release(*map(Path, sys.argv[1:]))
