from kfp import dsl
from kfp.dsl import Input, Model, Output

from anneal_kubeflow import optimize_component

optimize = optimize_component(
    packages=[]
)  # of an image that has the client: base_image=…; else packages=["anneal-client"]


@dsl.component(base_image="python:3.11-slim")
def train(source: str, model: Output[Model]):
    import shutil

    shutil.copy(source, model.path)


@dsl.component(base_image="python:3.11-slim")
def deploy(bundle: Input[Model], speedup: float) -> str:
    import zipfile

    with zipfile.ZipFile(bundle.path) as archive:
        assert "infer.py" in archive.namelist()
    return f"{bundle.metadata['engine_id']} is {speedup:.3g} times as fast"


@dsl.pipeline(name="release")
def release(source: str, url: str, spec: dict) -> str:
    trained = train(source=source)
    found = optimize(model=trained.outputs["model"], url=url, spec=spec, name="digits")
    return deploy(bundle=found.outputs["engine"], speedup=found.outputs["speedup"]).output
