"""The Kubeflow component in kfp's own local runner; runs in the environment of kfp (test_kubeflow.py)."""

# No `from __future__ import annotations`: kfp reads the annotations.
import json
import sys

import example_pipeline
from kfp import compiler, dsl, local
from kfp.dsl import HTML, Input, Metrics, Model, Output

from anneal_kubeflow import optimize_component

optimize = optimize_component(packages=[])


@dsl.component
def train(source: str, model: Output[Model]):
    import shutil

    shutil.copy(source, model.path)


@dsl.component
def look(
    bundle: Input[Model], metrics: Input[Metrics], report: Input[HTML], promise: str, speedup: float, job_id: str
) -> str:
    import json
    import zipfile
    from pathlib import Path

    with zipfile.ZipFile(bundle.path) as archive:
        names = archive.namelist()
    told = {"names": names, "metadata": bundle.metadata, "metrics": metrics.metadata}
    parameters = {"promise": promise, "speedup": speedup, "job_id": job_id}
    return json.dumps({**told, **parameters, "report": Path(report.path).read_text()[:200]})


@dsl.pipeline(name="release")
def release(source: str, url: str, spec: dict) -> str:
    trained = train(source=source)
    found = optimize(model=trained.outputs["model"], url=url, spec=spec, name="sum")
    told = {name: found.outputs[name] for name in ("metrics", "report", "promise", "speedup", "job_id")}
    return look(bundle=found.outputs["engine"], **told).output


def main(url: str, source: str, folder: str, kept: str, missed: str) -> dict:
    compiler.Compiler().compile(release, f"{folder}/release.yaml")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=f"{folder}/outputs")
    found = json.loads(release(source=source, url=url, spec=json.loads(kept)).output)
    example = example_pipeline.release(source=source, url=url, spec=json.loads(kept)).output
    assert "times as fast" in example, example
    try:
        release(source=source, url=url, spec=json.loads(missed))
    except RuntimeError as error:
        return {**found, "failed": str(error)}
    return {**found, "failed": None}


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
