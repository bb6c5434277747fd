"""The flow of `examples/platforms` on a server of Prefect's own (test_orchestrators.py). The last line is JSON."""

import json
import socket
import sys
from pathlib import Path

import prefect_flow
from asked_hosts import asked_hosts
from prefect.client.orchestration import get_client
from prefect.states import Failed
from prefect.testing.utilities import prefect_test_harness

from anneal_client import Client, ConnectionFailed, InvalidRequest


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def goes_on(url: str, model: Path, kept: dict) -> dict:
    """The first connection leads nowhere, and the first deployment fails: the second run of the flow goes on."""
    places = [f"http://127.0.0.1:{closed_port()}"]
    anneal, deploy = prefect_flow.anneal, prefect_flow.deploy
    prefect_flow.anneal = lambda: Client(places.pop() if places else url, retries=0)
    deployed = []

    @prefect_flow.task
    def fails_first(engine_id: str, bundle: Path) -> str:
        deployed.append(engine_id)
        if len(deployed) == 1:
            raise RuntimeError("the first deployment fails")
        return engine_id

    prefect_flow.deploy = fails_first
    state = prefect_flow.release.with_options(retries=1)(model, None, kept, return_state=True)
    prefect_flow.anneal, prefect_flow.deploy = anneal, deploy
    return {"state": state.name, "deployed": deployed, "away": places}


def nothing_is_faster(model: Path) -> list[str]:
    """What the flow makes of an outcome that no machine can be made to find each time."""
    outcome = prefect_flow.outcome

    @prefect_flow.task
    def found(_job_id: str) -> dict:
        return {"job_id": "job_x", "engine_id": "eng_x", "promise": "nothing_faster", "figures": {}}

    submit, prefect_flow.submit = prefect_flow.submit, prefect_flow.task(lambda asked: asked["model_id"])
    prefect_flow.outcome = found
    state = prefect_flow.release(model, None, {}, return_state=True)
    prefect_flow.outcome, prefect_flow.submit = outcome, submit
    return [state.type.value, state.name]


def main(url: str, source: str, folder: str, kept: str, missed: str) -> dict:
    hosts = asked_hosts()
    model, bundle = Path(source), Path(folder, "bundle.zip")
    with prefect_test_harness(server_startup_timeout=90), Client(url) as client:
        path = prefect_flow.release(model, None, json.loads(kept), bundle)
        with get_client(sync_client=True) as server:
            (table, *_) = server.read_artifacts()
        before = len(list(client.jobs()))
        again = goes_on(url, model, json.loads(kept))
        again["jobs"] = len(list(client.jobs())) - before
        state = prefect_flow.release(model, None, json.loads(missed), bundle, return_state=True)
        nothing = nothing_is_faster(model)
    kinds = (ConnectionFailed("code", "detail"), InvalidRequest("code", "detail"), RuntimeError("other"))
    return {
        "bundle": str(path),
        "figures": {row["figure"]: row["value"] for row in json.loads(table.data)},
        "again": again,
        "missed": [state.type.value, str(state.message)],
        "nothing": nothing,
        "tried again": [type(e).__name__ for e in kinds if prefect_flow.is_away(None, None, Failed(data=e))],
        "hosts": sorted(hosts),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
