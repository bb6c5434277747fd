"""A component for Kubeflow Pipelines that optimizes a model at a service of Anneal.

    from anneal_kubeflow import optimize_component

    optimize = optimize_component()

    @dsl.pipeline
    def release(url: str):
        trained = train()
        optimize(model=trained.outputs["model"], url=url, spec={"objective": "latency"})

What runs in the component's container is `_optimize` alone: it needs `anneal-client`, and nothing of this file.
"""

# No `from __future__ import annotations`: kfp reads the annotations.
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Metrics, Model, Output


def _optimize(
    model: Input[Model],
    url: str,
    engine: Output[Model],
    metrics: Output[Metrics],
    report: Output[HTML],
    calibration: Input[Dataset] = None,
    validation: Input[Dataset] = None,
    spec: dict = {},  # noqa: B006  # kfp reads the default
    filename: str = "model.onnx",
    name: str = "model",
    require_kept: bool = True,
) -> NamedTuple("Outputs", [("job_id", str), ("engine_id", str), ("promise", str), ("speedup", float)]):
    """Optimize a model, and hand on the engine's bundle with its figures.

    Args:
        model: An `.onnx`, a `.pt2`, or an archive of an `.onnx` with its external data.
        url: Address of the service. Its key, where it wants one, is taken from the variable ANNEAL_API_KEY.
        calibration: `.npz` with arrays named by the model's inputs.
        validation: `.npz` likewise, with `labels` or expected outputs.
        spec: Further fields of the job: objective, constraints, precisions, ….
        filename: What kind of file `model` is, by its ending, where its path has none.
        name: Of the model, in the report.
        require_kept: Whether the task fails where no engine is both faster and within the limits.

    Returns:
        engine: The bundle (.zip): engine, infer.py, serve.py, manifest. Its metadata has job, precision and digest.
        metrics: Latencies (ms), speed-up, accuracy loss (percent), sizes (MB) of the engine.
        report: The job's report as a page.
        promise: kept, unproven (from a busy machine, as the spec allows), nothing_faster (then the bundle holds the
            original), limits_missed or failed.
    """
    import os
    import shutil
    import tempfile
    from collections import namedtuple
    from pathlib import Path

    from anneal_client import Client, JobFailed
    from anneal_client.figures import metrics_of, promise_of, ships, tags_of

    def upload(send, artifact, ending):
        """An artifact's path may have no ending, which tells the service what it is."""
        path = Path(artifact.path)
        if path.suffix:
            return send(path, name)["id"]
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / ending
            link.symlink_to(path.resolve())
            return send(link, name)["id"]

    with Client(url, os.environ.get("ANNEAL_API_KEY") or None) as client:
        asked = {**spec, "model_id": upload(client.upload_model, model, filename)}
        for part, data in (("calibration", calibration), ("validation", validation)):
            if data is not None:
                dataset = upload(client.upload_dataset, data, "data.npz")
                asked[part] = {**asked.get(part, {}), "dataset_id": dataset}
        job = client.submit(asked)
        print(f"{job['id']} at {url}")
        job = client.wait(job["id"], lambda event: print(event.type, dict(event.data)), check=False)
        # The job's report is there for one that missed its limits, too.
        told = client.report(job["id"]) if job["status"] == "succeeded" else {}
        promise = promise_of(job, told)
        engine_id = (job["engine_ids"] or [""])[0]
        if require_kept and not ships(promise):
            raise JobFailed(job) if job["status"] != "succeeded" else SystemExit(f"{job['id']}: {promise}")
        figures = metrics_of(told)
        for key, value in figures.items():
            metrics.log_metric(key, value)
        if told:
            Path(report.path).parent.mkdir(parents=True, exist_ok=True)
            Path(report.path).write_text(client.report_page(job["id"]), encoding="utf-8")
        if engine_id:
            engine.metadata.update(tags_of(job, told, client.engine(engine_id)))
            with tempfile.TemporaryDirectory() as folder:
                bundle = client.download_bundle(engine_id, Path(folder) / "bundle.zip")
                Path(engine.path).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(bundle, engine.path)
    outputs = namedtuple("Outputs", ["job_id", "engine_id", "promise", "speedup"])
    return outputs(job["id"], engine_id, promise, figures.get("speedup", 1.0))


def optimize_component(
    *,
    base_image: str = "python:3.11-slim",
    packages: Sequence[str] = ("anneal-client",),
    **options: Any,
) -> Callable[..., Any]:
    """The component. `packages`: what pip installs in the container (an address or a path where the client is not in
    your index; empty where the image has it). `options`: further ones of `kfp.dsl.component`."""
    return dsl.component(base_image=base_image, packages_to_install=list(packages), **options)(_optimize)
