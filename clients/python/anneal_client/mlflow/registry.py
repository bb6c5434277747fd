"""Optimize what stands in MLflow's registry, and put the engine back there.

What was done for a version stands on it as tags: `anneal.state` (accepted, submitted, registered, kept_original,
failed), `anneal.job_id`, `anneal.engine_version`, `anneal.error`. A call that is repeated, in another process too, goes
on where the one before stopped: a version has one job for a spec, and one engine of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

from anneal_client.client import Client
from anneal_client.errors import AnnealError, ConnectionFailed, NotFound, Unavailable
from anneal_client.events import Event
from anneal_client.mlflow.sources import uploadable
from anneal_client.mlflow.tracking import Logged, log_job
from anneal_client.transfer import sha256_of

STATE, KEY, JOB, ENGINE, ERROR = (f"anneal.{n}" for n in ("state", "job_key", "job_id", "engine_version", "error"))
SOURCE = "anneal.source"  # on the engine's version: where it comes from
OPEN = ("accepted", "submitted")
_VERSION = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[^/@]+)|@(?P<alias>[^/@]+))")


@dataclass(frozen=True)
class Source:
    """A model in MLflow: a `version` of a registered model, or any other model `uri` (then `name` is its own)."""

    uri: str
    name: str
    version: str | None
    run_id: str | None
    tags: Mapping[str, str]

    def tag(self, key: str, value: str) -> None:
        """Note it on the version, where there is one."""
        if self.version is not None:
            mlflow.MlflowClient().set_model_version_tag(self.name, self.version, key, value[:5000])


def resolved(model_uri: str) -> Source:
    """`models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest` as a version, so that an alias that moves
    meanwhile changes nothing; any other URI as it is. Raises AnnealError `no_such_model`."""
    registry = mlflow.MlflowClient()
    match = _VERSION.fullmatch(model_uri)
    if match is None:
        return Source(model_uri, "model", None, None, {})
    name, version = match["name"], match["version"]
    try:
        if match["alias"] is not None:
            found = registry.get_model_version_by_alias(name, match["alias"])
        elif version == "latest":
            newest = registry.search_model_versions(f"name='{name}'", order_by=["version_number DESC"], max_results=1)
            if not newest:
                raise AnnealError("no_such_model", f"{name} has no version.")
            found = newest[0]
        else:
            found = registry.get_model_version(name, version)
    except MlflowException as error:
        raise AnnealError("no_such_model", f"{model_uri}: {error.message}") from error
    return Source(f"models:/{name}/{found.version}", name, str(found.version), found.run_id, dict(found.tags))


def optimize(
    client: Client,
    model_uri: str,
    spec: Mapping[str, Any] | None = None,
    *,
    calibration: str | Path | None = None,
    validation: str | Path | None = None,
    registered_model_name: str | None = None,
    alias: str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> Logged:
    """Optimize a model of MLflow and register the engine. Blocks until the job has ended.

    `model_uri`: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `runs:/…` or any other that MLflow knows; a model with an
    `.onnx` or a `.pt2`. `spec`: fields of the job. `calibration`, `validation`: data sets (`.npz`) to upload for it;
    ids of uploaded ones go into the spec. The engine becomes a version of `registered_model_name` (default:
    NAME-anneal) with `alias`, where it ships in place of the original, in a run of its own in the model's experiment.

    Raises AnnealError: `JobFailed`, `unsupported_flavor`, `already_an_engine`, `no_such_model`, ….
    """
    source = resolved(model_uri)
    try:
        job = _job_of(client, source, dict(spec or {}), {"calibration": calibration, "validation": validation})
        job = client.wait(job["id"], on_event, check=False)
        logged = _earlier(source, job["id"]) or log_job(
            client,
            job["id"],
            experiment_id=_experiment_of(source),
            registered_model_name=registered_model_name or f"{source.name}-anneal",
            alias=alias,
            tags={SOURCE: source.uri},
        )
    except (ConnectionFailed, Unavailable) as error:
        source.tag(ERROR, str(error))  # the state stays as it is: a further call goes on
        raise
    except (AnnealError, MlflowException) as error:
        source.tag(ERROR, str(error))
        source.tag(STATE, "failed")
        raise
    if logged.version_uri is not None:
        source.tag(ENGINE, logged.version_uri)
    source.tag(STATE, "registered" if logged.version is not None else "kept_original")
    return logged


def _job_of(
    client: Client, source: Source, spec: dict[str, Any], data: Mapping[str, str | Path | None]
) -> Mapping[str, Any]:
    """The version's job for this spec and these data sets: the one that it has, or a new one."""
    digests = {part: _digests(Path(path)) for part, path in data.items() if path is not None}
    key = hashlib.sha256(json.dumps([spec, digests], sort_keys=True).encode()).hexdigest()
    if source.tags.get(KEY) == key and JOB in source.tags:
        with contextlib.suppress(NotFound):  # of another service, say
            return client.job(source.tags[JOB])
    model_id = _uploaded(client, source)
    for part, path in data.items():
        if path is not None:
            spec[part] = {**(spec.get(part) or {}), "dataset_id": client.upload_dataset(path)["id"]}
    job = client.submit(spec, model_id=model_id)
    source.tag(KEY, key)
    source.tag(JOB, job["id"])
    source.tag(STATE, "submitted")
    return job


def _digests(data: Path) -> list[str]:
    """Of a file, or of the shards in a folder."""
    return [sha256_of(path) for path in (sorted(data.glob("*.npz")) if data.is_dir() else [data])]


def _uploaded(client: Client, source: Source) -> str:
    with tempfile.TemporaryDirectory(prefix="anneal-") as scratch:
        local = mlflow.artifacts.download_artifacts(artifact_uri=source.uri, dst_path=scratch)
        model = client.upload_model(uploadable(Path(local)), source.name)
    return str(model["id"])


def _earlier(source: Source, job_id: str) -> Logged | None:
    """The engine's version, where a call before registered it and could not say so any more."""
    if source.version is None:
        return None
    for version in mlflow.MlflowClient().search_model_versions(f"tags.`{JOB}` = '{job_id}'"):
        if version.tags.get(SOURCE) == source.uri:
            promise = version.tags.get("anneal.promise", "kept")
            return Logged(version.run_id, promise, version.source, version.name, str(version.version))
    return None


def _experiment_of(source: Source) -> str | None:
    if source.run_id is None:
        return None
    return str(mlflow.MlflowClient().get_run(source.run_id).info.experiment_id)
