"""What users of MLflow do with Anneal; runs in the environment of MLflow (test_mlflow.py). The last line is JSON."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx

from anneal_client import AnnealError, Client, JobFailed
from anneal_client.mlflow import load_model, log_job, optimize

ROWS = np.arange(32, dtype=np.float32).reshape(2, 16)


def register(name: str, path: str, alias: str | None = None) -> dict[str, Any]:
    """A model as somebody trained it: logged in a run, registered, with an alias."""
    with mlflow.start_run(run_name="training"):
        info = mlflow.onnx.log_model(
            onnx.load(path), name="net", registered_model_name=name, pip_requirements=["onnxruntime"]
        )
    version = info.registered_model_version
    if alias is not None:
        mlflow.MlflowClient().set_registered_model_alias(name, alias, version)
    return {"version": str(version)}


def log(url: str, path: str, kept: str, missed: str) -> dict[str, Any]:
    """Jobs that were run without MLflow, logged: one with an engine, one without."""
    registry = mlflow.MlflowClient()
    with Client(url) as client:
        model = client.upload_model(path, "sum")
        job = client.wait(client.submit(json.loads(kept), model_id=model["id"])["id"])
        none = client.wait(client.submit(json.loads(missed), model_id=model["id"])["id"], check=False)
        mlflow.set_experiment("sums")
        with mlflow.start_run() as mine:
            logged = log_job(client, job["id"], registered_model_name="sums", alias="fast", tags={"team": "a"})
            assert logged.run_id == mine.info.run_id, "the active run"
        assert logged.promise in ("kept", "unproven"), "unproven where this machine is busy"
        try:
            log_job(client, none["id"], registered_model_name="sums")
        except JobFailed as failed:
            assert failed.code == "no_feasible_candidate", failed
        else:
            raise AssertionError("a job without an engine")
        without = log_job(client, none["id"], registered_model_name="sums", check=False)
        engine = client.engine(job["engine_ids"][0])
        report = client.report(job["id"])
    assert (without.promise, without.version, without.model_uri) == ("limits_missed", None, None)
    assert registry.get_run(without.run_id).data.tags["anneal.error"] == "no_feasible_candidate"
    assert len(registry.search_model_versions("name='sums'")) == 1

    run = registry.get_run(logged.run_id)
    version = registry.get_model_version_by_alias("sums", "fast")
    assert version.version == logged.version
    assert version.source == logged.model_uri, "the version refers to the logged model"
    files = {f.path for f in registry.list_artifacts(logged.run_id, "anneal")}
    page = mlflow.artifacts.load_text(f"runs:/{logged.run_id}/anneal/report.html")
    assert page.lstrip().lower().startswith("<!doctype html")
    assert mlflow.artifacts.load_dict(f"runs:/{logged.run_id}/anneal/report.json") == report
    model = registry.get_logged_model(logged.model_uri.removeprefix("models:/"))
    assert {m.key for m in model.metrics} == set(run.data.metrics), "the figures stand on the model, too"
    return {
        "files": sorted(files),
        "metrics": run.data.metrics,
        "params": run.data.params,
        "tags": version.tags,
        "description": version.description,
        "engine": engine,
        "report": report["final_metrics"],
    }


def load() -> dict[str, Any]:
    """The engine by MLflow's own loader, and by the flavour's."""
    model = mlflow.pyfunc.load_model("models:/sums@fast")
    signature = model.metadata.signature
    told = [(t.name, t.type, t.shape) for side in (signature.inputs, signature.outputs) for t in side]
    assert told == [(name, np.dtype("float32"), (-1, 16)) for name in ("input", "output")], told
    found = model.predict({"input": ROWS})["output"]
    np.testing.assert_array_equal(load_model("models:/sums@fast")({"input": ROWS})["output"], found)
    try:
        model.predict({"input": ROWS.astype(np.float64)})
    except mlflow.exceptions.MlflowException as error:
        assert "float32" in str(error)
    else:
        raise AssertionError("the signature says float32")
    return {"output": found.tolist(), "flavors": sorted(model.metadata.flavors)}


def registered(url: str, model_uri: str, spec: str) -> dict[str, Any]:
    """Optimize what is in the registry, twice: the second call finds all of it done."""
    registry = mlflow.MlflowClient()
    with Client(url) as client:
        logged = optimize(client, model_uri, json.loads(spec), alias="fast")
        again = optimize(client, model_uri, json.loads(spec), alias="fast")
        assert (again.version, again.run_id) == (logged.version, logged.run_id)
        for bad, code in ((logged.version_uri, "already_an_engine"), ("models:/nothing@here", "no_such_model")):
            try:
                optimize(client, bad, json.loads(spec))
            except AnnealError as error:
                assert error.code == code, error
            else:
                raise AssertionError(bad)
    name, _, version = logged.version_uri.removeprefix("models:/").partition("/")
    found = registry.get_model_version(name, version)
    source, _, number = found.tags["anneal.source"].removeprefix("models:/").partition("/")
    of = registry.get_model_version(source, number)
    run = registry.get_run(logged.run_id)
    training = registry.get_run(of.run_id)
    assert run.info.experiment_id == training.info.experiment_id
    output = mlflow.pyfunc.load_model(f"models:/{name}@fast").predict({"input": ROWS})["output"]
    return {"name": name, "version": version, "source": of.tags, "output": output.tolist()}


def external(url: str, folder: str) -> dict[str, Any]:
    """A model whose weights lie beside it, as `mlflow.onnx` saves larger ones."""
    from anneal_client.mlflow.sources import uploadable

    made = onnx.helper
    big = onnx.numpy_helper.from_array(np.ones((16, 64), np.float32), "weights")
    tensors = [
        made.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", size]) for n, size in (("x", 16), ("y", 64))
    ]
    graph = made.make_graph([made.make_node("MatMul", ["x", "weights"], ["y"])], "g", tensors[:1], tensors[1:], [big])
    model = made.make_model(graph, opset_imports=[made.make_opsetid("", 17)], ir_version=10)
    mlflow.onnx.save_model(model, f"{folder}/model", pip_requirements=["onnxruntime"])
    found = uploadable(Path(folder, "model"))
    with Client(url) as client:
        uploaded = client.upload_model(found, "external")
    return {"file": found.name, "size": found.stat().st_size, "uploaded": uploaded}


def documented(url: str, page: str, job_id: str, model: str, spec: str, data: str) -> dict[str, Any]:
    """The page's blocks on MLflow, with this service, this job, this model and its data in place of theirs."""
    register("digits", model, "champion")
    text, _, _ = Path(page).read_text().partition("## Kubeflow")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {"array": ROWS, "spec": json.loads(spec)}
    theirs = {"http://127.0.0.1:8000": url, "job_…": job_id, "held_out.npz": data}
    for block in blocks:
        text = block.replace('{"validation": {"max_accuracy_loss_percent": 1.0}}', "spec")
        for their, ours in theirs.items():
            text = text.replace(their, ours)
        names["client"] = Client(url)  # closed by the block before
        exec(text, names)
    found = mlflow.MlflowClient().search_model_versions("name='digits-anneal'")
    return {"blocks": len(blocks), "versions": len(found), "output": names["outputs"]["output"].tolist()}


def webhook(address: str, secret: str, event: str) -> dict[str, Any]:
    found = mlflow.MlflowClient().create_webhook(
        name=f"anneal-{event[-7:-4]}", url=address, events=[event], secret=secret
    )
    return {"id": found.webhook_id}


def version_of(name: str, version: str, states: str, timeout_s: str) -> dict[str, Any]:
    """The tags of a version, once its state is one of `states`."""
    deadline = time.monotonic() + float(timeout_s)
    tags: dict[str, str] = {}
    while time.monotonic() < deadline:
        tags = mlflow.MlflowClient().get_model_version(name, version).tags
        if tags.get("anneal.state") in (*states.split(","), "failed"):
            break
        time.sleep(0.1)
    return {"tags": tags}


def versions(name: str) -> dict[str, Any]:
    found = mlflow.MlflowClient().search_model_versions(f"name='{name}'")
    return {"tags": [version.tags for version in found]}


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
