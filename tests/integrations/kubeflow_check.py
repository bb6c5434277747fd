"""The Kubeflow component in kfp's own local runner; runs in the environment of kfp (test_kubeflow.py)."""

# No `from __future__ import annotations`: kfp reads the annotations.
import json
import sys
import zipfile
from pathlib import Path

from kfp import compiler, dsl, local
from kfp.dsl import Input, Model, Output

from anneal_kubeflow import optimize_component

optimize = optimize_component(packages=[])


@dsl.component
def train(source: str, model: Output[Model]):
    import shutil

    shutil.copy(source, model.path)


@dsl.component
def look(bundle: Input[Model]) -> str:
    import zipfile

    with zipfile.ZipFile(bundle.path) as archive:
        return " ".join(sorted(archive.namelist()))


@dsl.pipeline(name="release")
def release(source: str, url: str, spec: dict) -> str:
    trained = train(source=source)
    engine = optimize(model=trained.outputs["model"], url=url, spec=spec, name="sum")
    return look(bundle=engine.outputs["engine"]).output


@dsl.component
def write(text: str, model: Output[Model]):
    from pathlib import Path

    Path(model.path).write_text(text)


def main(url: str, source: str, folder: str, kept: str, missed: str) -> dict:
    compiler.Compiler().compile(release, f"{folder}/release.yaml")
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=f"{folder}/outputs")
    whole = release(source=source, url=url, spec=json.loads(kept))
    assert "infer.py" in whole.output, whole.output
    trained = train(source=source)
    alone = optimize(model=trained.outputs["model"], url=url, spec=json.loads(kept), name="sum")
    figures = alone.outputs["metrics"].metadata
    engine = alone.outputs["engine"]
    assert zipfile.is_zipfile(engine.path)
    try:
        optimize(model=trained.outputs["model"], url=url, spec=json.loads(missed), name="sum")
    except RuntimeError as error:
        failed = str(error)
    else:
        failed = ""
    return {
        "promise": alone.outputs["promise"],
        "speedup": alone.outputs["speedup"],
        "job_id": alone.outputs["job_id"],
        "metrics": figures,
        "metadata": engine.metadata,
        "report": Path(alone.outputs["report"].path).read_text()[:200],
        "failed": failed,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
