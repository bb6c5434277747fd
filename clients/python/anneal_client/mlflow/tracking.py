"""A job of Anneal in an MLflow run: its report, its figures and its engine, and the engine in the registry."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.models import Model

from anneal_client import figures
from anneal_client.client import Client
from anneal_client.errors import AnnealError, JobFailed
from anneal_client.mlflow import flavor

Json = dict[str, Any]

_ARTIFACTS = "anneal"  # the folder of the run


@dataclass(frozen=True)
class Logged:
    """What was written. `promise`: kept, unproven, nothing_faster, limits_missed or failed. `model_uri`: of the logged
    engine; `version`: where it was registered. Both are None for a job without an engine."""

    run_id: str
    promise: figures.Promise
    model_uri: str | None = None
    registered_model_name: str | None = None
    version: str | None = None

    @property
    def version_uri(self) -> str | None:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.registered_model_name}/{self.version}" if self.version else None


def log_job(
    client: Client,
    job_id: str,
    *,
    run_id: str | None = None,
    experiment_id: str | None = None,
    registered_model_name: str | None = None,
    alias: str | None = None,
    tags: Mapping[str, str] | None = None,
    check: bool = True,
) -> Logged:
    """Write a job that has ended to an MLflow run: parameters (what was asked for), metrics, tags, in the folder
    `anneal` its report (JSON, HTML), manifest and candidates, and the engine as a model of the flavour `anneal`.

    The run: `run_id`, else the active one, else a new one in `experiment_id`. `registered_model_name`: register the
    engine as a version of it, with signature, tags (`tags`: further ones) and `alias`, where it ships in place of the
    original. The weights are stored once: the version refers to the logged model, and the run holds no other copy.

    Raises `JobFailed` where the job has not succeeded, after what there is was logged (`check=False`: does not raise).
    """
    job = client.job(job_id)
    report = _report(client, job)
    with _run(run_id, experiment_id, f"anneal {job_id}") as run:
        engine = client.engine(job["engine_ids"][0]) if job.get("engine_ids") else None
        told = {f"anneal.{name}": value for name, value in figures.tags_of(job, report, engine).items()}
        _log_figures(run, job, report, told)
        with tempfile.TemporaryDirectory(prefix="anneal-") as scratch:
            _log_files(client, run, job, report)
            logged = Logged(run, figures.promise_of(job, report))
            if engine is not None and report is not None:
                model_id = _log_engine(client, run, engine, told, Path(scratch))
                logged = Logged(run, logged.promise, f"models:/{model_id}")
                if registered_model_name is not None and figures.ships(logged.promise):
                    found = {**told, **(tags or {})}
                    described = figures.description_of(job, report)
                    logged = _register(logged, registered_model_name, alias, found, described)
    if check and job["status"] != "succeeded":
        raise JobFailed(job)
    return logged


def _report(client: Client, job: Json) -> Json | None:
    """None where there is none. A job that no engine was good enough for has one, too."""
    try:
        return client.report(job["id"])
    except AnnealError:
        if job["status"] == "succeeded":
            raise
        return None


@contextmanager
def _run(run_id: str | None, experiment_id: str | None, name: str) -> Iterator[str]:
    active = mlflow.active_run()
    if active is not None and run_id in (None, active.info.run_id) and experiment_id is None:
        yield active.info.run_id
        return
    options: dict[str, Any] = {"run_id": run_id} if run_id else {"experiment_id": experiment_id, "run_name": name}
    with mlflow.start_run(**options, nested=active is not None) as run:
        yield run.info.run_id


def _log_figures(run_id: str, job: Json, report: Json | None, tags: Mapping[str, str]) -> None:
    now = int(time.time() * 1000)
    metrics = [Metric(f"anneal/{name}", value, now, 0) for name, value in figures.metrics_of(report or {}).items()]
    params = [Param(f"anneal.{name}", value) for name, value in figures.params_of(job).items()]
    found = [RunTag(name, value) for name, value in tags.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics=metrics, params=params, tags=found)


def _log_files(client: Client, run_id: str, job: Json, report: Json | None) -> None:
    store = mlflow.MlflowClient()
    if report is not None:
        store.log_dict(run_id, report, f"{_ARTIFACTS}/report.json")
        store.log_dict(run_id, report.get("candidates", []), f"{_ARTIFACTS}/candidates.json")
        store.log_text(run_id, client.report_page(job["id"]), f"{_ARTIFACTS}/report.html")
    if job["status"] == "succeeded":
        store.log_dict(run_id, client.manifest(job["id"]), f"{_ARTIFACTS}/manifest.json")


def _log_engine(client: Client, run_id: str, engine: Json, tags: Mapping[str, str], scratch: Path) -> str:
    """The id of the logged model."""
    bundle = client.download_bundle(engine["id"], scratch / "bundle.zip")
    name = Path(engine["bundle_filename"]).stem.removesuffix("-bundle")
    told = {"engine_id": engine["id"], "engine_sha256": engine["sha256"], "bundle_sha256": engine["bundle_sha256"]}
    info = Model.log(
        artifact_path=None,
        name=_model_name(name),
        flavor=flavor,
        flavor_name=flavor.FLAVOR_NAME,
        run_id=run_id,
        tags=dict(tags),
        bundle=bundle,
        facts=told,
    )
    bundle.unlink()
    return str(info.model_id)


def _model_name(name: str) -> str:
    """MLflow takes none of / : . % " ' in it."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name) or "engine"


def _register(logged: Logged, name: str, alias: str | None, tags: Mapping[str, str], description: str) -> Logged:
    version = mlflow.register_model(str(logged.model_uri), name, tags=dict(tags))
    registry = mlflow.MlflowClient()
    registry.update_model_version(name, version.version, description)
    if alias is not None:
        registry.set_registered_model_alias(name, alias, version.version)
    return Logged(logged.run_id, logged.promise, logged.model_uri, name, str(version.version))
