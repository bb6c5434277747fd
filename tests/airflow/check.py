"""What Airflow makes of the provider; runs in Airflow's environment (test_airflow.py). The last line is JSON."""

from __future__ import annotations

import json
import sys
from typing import Any


def run() -> dict[str, Any]:
    """The example DAG by Airflow's own `dag.test()`, which runs the trigger in its process."""
    import example_dag

    found = example_dag.dag.test()
    states = {ti.task_id: str(ti.state) for ti in found.get_task_instances()}
    values = {ti.task_id: ti.xcom_pull(task_ids=ti.task_id) for ti in found.get_task_instances()}
    return {"state": str(found.state), "tasks": states, "values": values}


def provider() -> dict[str, Any]:
    """What Airflow found by the entry point, and the connection that the environment names."""
    from airflow.providers_manager import ProvidersManager

    from anneal_airflow.hook import AnnealHook, address

    manager = ProvidersManager()
    hook = manager.hooks["anneal"]
    answer = AnnealHook("anneal_default").test_connection()
    none = AnnealHook("anneal_nowhere").test_connection()

    class Told:
        def __init__(self, **fields: Any) -> None:
            self.__dict__.update({"host": None, "port": None, "schema": None, "password": None, **fields})

    addresses = [
        address(Told(host="a.example", password="k")),
        address(Told(host="a.example", port=8000, password="k")),
        address(Told(host="https://a.example/base/")),
        address(Told(host="http://a.example/base", port=81)),
        address(Told(host="a.example", schema="http")),
        address(Told()),
    ]
    return {
        "package": hook.package_name,
        "class": hook.hook_class_name,
        "provider": "anneal-airflow" in manager.providers,
        "answer": answer,
        "none": none,
        "addresses": addresses,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
