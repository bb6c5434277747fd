"""Assets of Dagster: a model, the job that optimizes it, the engine with a check on the promise, what is deployed.

ANNEAL_URL=http://127.0.0.1:8000 dagster dev -f dagster_assets.py
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from anneal_client import AnnealError, Client, ConnectionFailed, Unavailable
from anneal_client.figures import metrics_of, promise_of, ships

PATIENT = dg.RetryPolicy(max_retries=5, delay=2, backoff=dg.Backoff.EXPONENTIAL)


class Anneal(dg.ConfigurableResource):
    """The service; its key, where it wants one, is in ANNEAL_API_KEY."""

    url: str

    @contextmanager
    def client(self) -> Iterator[Client]:
        try:
            with Client(self.url, os.environ.get("ANNEAL_API_KEY")) as client:
                yield client
        except AnnealError as error:
            # Another try helps where nobody answers; a model that is refused is refused again.
            away = isinstance(error, (ConnectionFailed, Unavailable))
            raise dg.Failure(str(error), allow_retries=away) from error


class Training(dg.Config):
    model: str


class Wanted(dg.Config):
    data: str | None = None
    spec: dict[str, Any] = Field(default_factory=dict)


class Place(dg.Config):
    bundle: str = "bundle.zip"


@dg.asset
def trained_model(config: Training) -> str:
    return config.model  # the path of what your training wrote


@dg.asset(retry_policy=PATIENT)
def request(config: Wanted, anneal: Anneal, trained_model: str) -> dict[str, Any]:
    """What is asked of the service, once model and data are there."""
    with anneal.client() as client:
        asked = {**config.spec, "model_id": client.upload_model(trained_model).id}
        if config.data is not None:
            dataset = {"dataset_id": client.upload_dataset(config.data).id}
            asked |= {part: {**config.spec.get(part, {}), **dataset} for part in ("calibration", "validation")}
    return asked


@dg.asset(retry_policy=PATIENT)
def optimization(context: dg.AssetExecutionContext, anneal: Anneal, request: dict[str, Any]) -> str:
    """The job's id: what comes after waits for this job, however often it is run again."""
    with anneal.client() as client:
        return client.submit(request, idempotency_key=context.run_id).id  # another try of this step gets the same job


@dg.asset(retry_policy=PATIENT)
def engine(anneal: Anneal, optimization: str) -> dg.Output[dict[str, Any]]:
    with anneal.client() as client:
        job = client.wait(optimization)  # JobFailed says why, and what helps
        report = client.report(job.id)
    figures, promise = metrics_of(report), promise_of(job, report)
    page = dg.MetadataValue.url(f"{anneal.url}/v1/jobs/{job.id}/report")
    value = {"engine_id": job.engine_ids[0], "promise": promise, "figures": figures}
    return dg.Output(value, metadata={"promise": promise, "report": page, **figures})


@dg.asset_check(asset=engine, blocking=True)
def promise_is_kept(engine: dict[str, Any]) -> dg.AssetCheckResult:
    """Faster, within every limit; else nothing after it runs."""
    speedup = engine["figures"].get("speedup", 1.0)
    return dg.AssetCheckResult(
        passed=ships(engine["promise"]), metadata={"promise": engine["promise"], "speedup": speedup}
    )


@dg.asset(retry_policy=PATIENT)
def deployed_bundle(config: Place, anneal: Anneal, engine: dict[str, Any]) -> dg.MaterializeResult:
    with anneal.client() as client:
        path = client.download_bundle(engine["engine_id"], Path(config.bundle))  # and from here to where it serves
    return dg.MaterializeResult(metadata={"bundle": dg.MetadataValue.path(str(path.resolve()))})


defs = dg.Definitions(
    assets=[trained_model, request, optimization, engine, deployed_bundle],
    asset_checks=[promise_is_kept],
    resources={"anneal": Anneal(url=os.environ.get("ANNEAL_URL", "http://127.0.0.1:8000"))},
)
