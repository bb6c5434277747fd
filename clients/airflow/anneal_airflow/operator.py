"""The operator: uploads, submits, gives its place back while the job runs, and hands on what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowException

from anneal_airflow.hook import AnnealHook
from anneal_airflow.trigger import AnnealJobTrigger
from anneal_client import Client, JobFailed
from anneal_client.figures import metrics_of, promise_of, ships


class AnnealOptimizeOperator(BaseOperator):
    """Optimize a model; answers (as XCom) {job_id, engine_id, promise, figures, bundle}.

    :param model: path of an `.onnx`, a `.pt2` or an archive, or the id of an uploaded model (`mdl_…`)
    :param spec: further fields of the job: objective, constraints, precisions, … (templated)
    :param calibration: path of an `.npz`, or the id of an uploaded data set (`dst_…`)
    :param validation: likewise
    :param bundle: where to write the engine's bundle (.zip), on the worker (None: nowhere)
    :param require_kept: fail where no engine is both faster and within the limits; else `promise` says what came of it
    :param anneal_conn_id: the connection, of the type `anneal`
    :param deferrable: whether a triggerer waits for the job; else the worker does
    :param poll_s: least time between two questions of the trigger, in seconds
    """

    template_fields: Sequence[str] = ("model", "spec", "calibration", "validation", "bundle", "anneal_conn_id")
    ui_color = "#f4d8a8"

    def __init__(
        self,
        *,
        model: str,
        spec: Mapping[str, Any] | None = None,
        calibration: str | None = None,
        validation: str | None = None,
        bundle: str | None = None,
        require_kept: bool = True,
        anneal_conn_id: str = AnnealHook.default_conn_name,
        deferrable: bool = True,
        poll_s: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.model = model
        self.spec = spec
        self.calibration = calibration
        self.validation = validation
        self.bundle = bundle
        self.require_kept = require_kept
        self.anneal_conn_id = anneal_conn_id
        self.deferrable = deferrable
        self.poll_s = poll_s
        self._job_id: str | None = None

    def execute(self, context: Any) -> dict[str, Any]:  # noqa: ARG002  # Airflow's signature
        with AnnealHook(self.anneal_conn_id).get_conn() as client:
            self._job_id = self._submit(client)
            self.log.info("Submitted %s", self._job_id)
            if self.deferrable:
                self.defer(
                    trigger=AnnealJobTrigger(self.anneal_conn_id, self._job_id, self.poll_s),
                    method_name="finish",
                )
            client.wait(self._job_id, lambda event: self.log.info("%s %s", event.type, dict(event.data)), check=False)
            return self._told(client, self._job_id)

    def finish(self, context: Any, event: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002  # likewise
        """Goes on when the trigger has fired."""
        if "error" in event:
            raise AirflowException(f"{event['job_id']}: {event['error']}")
        with AnnealHook(self.anneal_conn_id).get_conn() as client:
            return self._told(client, str(event["job_id"]))

    def on_kill(self) -> None:
        """A task that is killed on its worker, which has the job or waits for it by itself, ends the job."""
        if self._job_id is not None:
            with AnnealHook(self.anneal_conn_id).get_conn() as client:
                client.cancel(self._job_id)

    def _submit(self, client: Client) -> str:
        spec = dict(self.spec or {})
        spec["model_id"] = self.model if self.model.startswith("mdl_") else client.upload_model(self.model)["id"]
        for part, data in (("calibration", self.calibration), ("validation", self.validation)):
            if data is not None:
                dataset = data if data.startswith("dst_") else client.upload_dataset(data)["id"]
                spec[part] = {**(spec.get(part) or {}), "dataset_id": dataset}
        return str(client.submit(spec)["id"])

    def _told(self, client: Client, job_id: str) -> dict[str, Any]:
        job = client.job(job_id)
        report = client.report(job_id) if job["status"] == "succeeded" else None
        promise = promise_of(job, report)
        if self.require_kept and not ships(promise):
            if job["status"] != "succeeded":
                raise AirflowException(str(JobFailed(job)))
            raise AirflowException(f"{job_id}: {promise}; no engine ships in place of the original")
        engine_id = (job.get("engine_ids") or [None])[0]
        if self.bundle is not None and engine_id is not None:
            client.download_bundle(engine_id, Path(self.bundle))
        return {
            "job_id": job_id,
            "engine_id": engine_id,
            "promise": promise,
            "figures": metrics_of(report or {}),
            "bundle": self.bundle,
        }
