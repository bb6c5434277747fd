"""A DAG that optimizes a model and hands on what came of it. `make test-airflow` runs it."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime

from airflow.sdk import dag, task

from anneal_airflow.operator import AnnealOptimizeOperator


@dag(schedule="@once", start_date=datetime(2026, 1, 1, tzinfo=UTC), catchup=False, is_paused_upon_creation=False)
def release():
    optimized = AnnealOptimizeOperator(
        task_id="optimize",
        model=os.environ.get("MODEL", "/models/{{ ds }}/model.onnx"),
        spec=json.loads(os.environ.get("SPEC", "{}")),
        bundle=os.environ.get("BUNDLE", "/engines/{{ ds }}.zip"),
    )

    @task
    def deploy(engine: dict) -> str:
        return f"{engine['engine_id']} is {engine['figures']['speedup']} times as fast: {engine['bundle']}"

    deploy(optimized.output)


dag = release()
