"""Jobs of workers that share a machine: each waits while another measures, and says so."""

from __future__ import annotations

import time
from pathlib import Path

from tests.factories.deployment import deployment, job_row, submit_case
from workers.pipeline.machine import MachineLock, Place


def test_a_job_waits_for_a_measurement_and_tells(tmp_path: Path) -> None:
    with deployment(tmp_path / "home") as deployed, deployed.client() as client:
        lock = MachineLock(Path(deployed.environment["WORKER_LOCK_DIR"]), 60)
        db = deployed.database()
        try:
            with lock.hold(Place(alone=True), lambda: False, lambda: None):
                deployed.start_hurried_worker()
                deployed.wait_ready()
                job_id = submit_case(client, tmp_path, 1, target={"backends": ["onnxruntime"]}, precisions=["fp32"])[
                    "id"
                ]
                deployed.wait_for(lambda: any(s["detail"] for s in job_row(db, job_id).stages or ()))
                (stage,) = job_row(db, job_id).stages
                assert (stage["name"], stage["detail"]) == ("export", "waiting for the machine")
                time.sleep(0.5)
                assert job_row(db, job_id).stages[0]["status"] == "running"
            job = client.wait(job_id)
        finally:
            db.close()
        assert job["status"] == "succeeded"
        assert job["stages"][0]["waited_seconds"] > 0.9
        assert job["stages"][0]["detail"] is None
        assert "waiting for the machine" in [e.data.get("message") for e in client.events(job_id)]
