"""The assets of `examples/platforms` in runs of Dagster's own (test_orchestrators.py). The last line is JSON."""

import json
import socket
import sys
from pathlib import Path

import dagster as dg
import dagster_assets
from asked_hosts import asked_hosts


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(url: str, model: str, spec: dict, bundle: str, instance: dg.DagsterInstance) -> dict:
    """A run of all assets, as the page's "Materialize all" starts it."""
    job = dagster_assets.defs.resolve_implicit_global_asset_job_def()
    config = {
        "ops": {
            "trained_model": {"config": {"model": model}},
            "request": {"config": {"spec": spec}},
            "deployed_bundle": {"config": {"bundle": bundle}},
        },
        "resources": {"anneal": {"config": {"url": url}}},
    }
    done = job.execute_in_process(run_config=config, instance=instance, raise_on_error=False)
    checks = done.get_asset_check_evaluations()
    failures = [event.step_failure_data for event in done.all_events if event.is_step_failure]
    return {
        "success": done.success,
        "made": [event.asset_key.to_user_string() for event in done.get_asset_materialization_events()],
        "checks": {check.check_name: check.passed for check in checks},
        "metadata": {
            key: value.value
            for event in done.get_asset_materialization_events()
            if event.asset_key.to_user_string() == "engine"
            for key, value in event.materialization.metadata.items()
        },
        "failures": [f"{f.user_failure_data.description if f.user_failure_data else f.error}" for f in failures],
        "retries": sum(event.is_step_up_for_retry for event in done.all_events),
    }


def main(url: str, model: str, folder: str, kept: str, missed: str) -> dict:
    hosts = asked_hosts()
    bundle = str(Path(folder, "bundle.zip"))
    with dg.DagsterInstance.local_temp(folder, overrides={"telemetry": {"enabled": False}}) as instance:
        told = {
            "kept": run(url, model, json.loads(kept), bundle, instance),
            "missed": run(url, model, json.loads(missed), f"{bundle}.missed", instance),
            "refused": run(url, __file__, {}, bundle, instance),
        }
        told["gated"] = gated(url, model, f"{bundle}.gated", instance)
    return {**told, "hosts": sorted(hosts)}


def gated(url: str, model: str, bundle: str, instance: dg.DagsterInstance) -> dict:
    """An engine that is not faster, which no machine can be made to find each time: what follows does not run."""

    @dg.asset(name="engine")
    def no_faster() -> dict:
        return {"engine_id": "eng_x", "promise": "nothing_faster", "figures": {}}

    assets = [no_faster, dagster_assets.deployed_bundle, dagster_assets.promise_is_kept]
    resources = {"anneal": dagster_assets.Anneal(url=url)}
    config = {"ops": {"deployed_bundle": {"config": {"bundle": bundle}}}}
    done = dg.materialize(assets, resources=resources, run_config=config, instance=instance, raise_on_error=False)
    made = [event.asset_key.to_user_string() for event in done.get_asset_materialization_events()]
    return {"success": done.success, "made": made, "deployed": Path(bundle).exists()}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
