"""The engine that ships and its bundle: made as soon as the engine is proven, and once more when it is known how to
deploy it. The bundle's manifest holds what a user needs to know without this service."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from app.domain.artifact_key import ArtifactRef
from app.domain.failures import StageFailure
from app.domain.report import DeploymentConfig
from workers import kernel
from workers.measure.method import versions
from workers.members import names_of
from workers.pipeline.budget import Budget
from workers.pipeline.by_batch import by_batch_told
from workers.pipeline.chain_report import chain_told
from workers.pipeline.evaluate import SEED
from workers.pipeline.final import accepts, final_metrics, winner
from workers.pipeline.job_data import Data
from workers.pipeline.outcome import Proof, nodes_kept
from workers.pipeline.runner import StageRunner
from workers.pipeline.stage_calls import Outcome

log = structlog.get_logger(__name__)

_AT_ONCE_S = 2.0  # a bundle made in less is made again, whatever the budget has left
_AS_MADE_FIRST = "the bundle was made before these settings were known, and serving.json in it does not hold them"
_NOT_YET = "not known when the bundle was made: see the job's report"


def package(
    runner: StageRunner,
    proof: Proof,
    data: Data,
    deployment: DeploymentConfig | None = None,
    *,
    tritonserver: Path | None = None,
) -> Outcome:
    """The stage `package` of what ships. What was found out must not be lost for a few seconds: it may take what it
    needs, whatever the budget says."""
    inputs = {"engine": proof.engine}
    if data.validation is not None:
        inputs["data"] = data.validation
    options = {
        "name": f"{slug(proof.name)}-{proof.precision.replace('+', '-')}",
        "backend": proof.backend,
        "runtime": proof.runtime,
        "engine_format": _format(proof),
        "manifest": _manifest(proof, data, deployment),
        "engine_digest": proof.judged_digest,
        "shapes": data.shapes,
        "seed": SEED,
        "tritonserver": None if tritonserver is None else str(tritonserver),
    }
    return runner.run("package", inputs, options)


def completed(
    runner: StageRunner,
    proof: Proof,
    data: Data,
    first: Outcome,
    deployment: DeploymentConfig,
    budget: Budget,
    *,
    tritonserver: Path | None = None,
) -> tuple[Outcome, str | None]:
    """The bundle with the deployment in its manifest and its settings in `serving.json`; the `first` one where that
    fails or would take long, and why, in words for the report."""
    left = budget.left(budget.end)
    if first.seconds > _AT_ONCE_S and first.seconds > left:
        why = f"to make it again takes about {first.seconds:.0f} s, and the budget had {max(left, 0.0):.0f} s left"
        return first, f"{_AS_MADE_FIRST}: {why}"
    try:
        return package(runner, proof, data, deployment, tritonserver=tritonserver), None
    except StageFailure as failure:
        log.warning("bundle_not_completed", code=failure.code, detail=failure.detail)
        return first, f"{_AS_MADE_FIRST}: with them the bundle failed ({failure.code}: {failure.detail})"


def _manifest(proof: Proof, data: Data, deployment: DeploymentConfig | None) -> dict[str, Any]:
    return {
        "job": {"id": proof.job.id, "objective": proof.spec.objective},
        "engine": {
            "candidate": proof.verdict.picked,
            "backend": proof.backend,
            "format": _format(proof),
            "precision": proof.precision,
            "runtime": proof.runtime,
            "accepts": accepts(proof),
            "files": proof.engine.to_json(),
            "nodes_kept": nodes_kept(proof.picked),
            **by_batch_told(proof),
        },
        "model": {
            "id": proof.model.id,
            "name": proof.model.name,
            "format": proof.model.format,
            "sha256": proof.model.sha256,
        },
        **chain_told(proof),
        "data": {
            "calibration": _files(data.calibration),
            "validation": _files(data.validation),
            "split": data.same,  # one data set for both, of which what calibrates never judges
        },
        "figures": _figures(proof),
        "measured": {k: proof.benchmark.made.get(k) for k in ("at", "worker")},
        "deployment": {"reason": _NOT_YET} if deployment is None else _deployment(deployment),
        "inputs": proof.export.data["inputs"],
        "outputs": proof.export.data["outputs"],
        "labels": proof.export.data["labels"],
        "hardware": dict(proof.benchmark.made.get("hardware") or proof.hardware),
        "versions": versions(names_of(proof.backend, proof.runtime)),
    }


def _figures(proof: Proof) -> dict[str, Any]:
    shipped = winner(proof)
    return {
        **final_metrics(proof).model_dump(mode="json"),
        "limit_percent": proof.spec.validation.max_accuracy_loss_percent,
        "checks": [c.to_json() for c in shipped.checks],
        "batches": dict((shipped.figures or {}).get("batches", {})),
    }


def _deployment(config: DeploymentConfig) -> Mapping[str, Any]:
    return config.model_dump(mode="json", exclude={"sweep"})


def _files(ref: ArtifactRef | None) -> list[dict[str, Any]] | None:
    return None if ref is None else list(ref.to_json())


def _format(proof: Proof) -> str:
    return kernel.backends()[proof.backend].engine_format


def slug(name: str) -> str:
    """A file name's stem that is safe everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"
