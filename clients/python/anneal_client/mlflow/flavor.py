"""The MLflow flavour `anneal`: a bundle as an MLflow model. The bundle is unpacked into the model's folder, which is
the one place where the weights lie; `infer.py` of the bundle loads them from there."""

from __future__ import annotations

import json
import platform
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.types import Schema, TensorSpec

from anneal_client.errors import AnnealError
from anneal_client.mlflow import anneal_engine_pyfunc
from anneal_client.mlflow.anneal_engine_pyfunc import Engine

FLAVOR_NAME = "anneal"
_BUNDLE = "bundle"
_CODE = "code"
_SERVERS = ("httptools", "orjson", "uvicorn", "uvloop")  # of the bundle's own `serve.py`, which MLflow does not run


def save_model(
    bundle: str | Path,
    path: str | Path,
    *,
    mlflow_model: Any = None,
    signature: Any = None,
    facts: Mapping[str, Any] | None = None,
    pip_requirements: Sequence[str] | None = None,
) -> None:
    """Save a bundle (the .zip of `Client.download_bundle`) as an MLflow model in the folder `path`, which must not
    exist or be empty.

    `signature`: by default read from the bundle's manifest. `facts`: further entries of the flavour in `MLmodel`.
    `pip_requirements`: by default MLflow and what the bundle's `infer.py` needs.
    """
    folder = Path(path)
    if folder.exists() and any(folder.iterdir()):
        raise AnnealError("folder_not_empty", f"{folder} is not empty.", remedy="Name a folder that does not exist.")
    manifest = _unpacked(Path(bundle), folder / _BUNDLE)
    model = Model() if mlflow_model is None else mlflow_model
    found = signature_of(manifest) if signature is None else signature
    if found is not None:
        model.signature = found
    (folder / _CODE).mkdir()
    loader = Path(anneal_engine_pyfunc.__file__)
    shutil.copy(loader, folder / _CODE / loader.name)
    _write_environment(folder, pip_requirements)
    mlflow.pyfunc.add_to_model(
        model,
        loader_module=loader.stem,
        data=_BUNDLE,
        code=_CODE,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    engine = manifest.get("engine", {})
    told = {name: engine.get(name) for name in ("backend", "format", "precision")}
    job = (manifest.get("job") or {}).get("id")
    model.add_flavor(FLAVOR_NAME, data=_BUNDLE, code=_CODE, **told, job_id=job, **(facts or {}))
    model.model_size_bytes = sum(p.stat().st_size for p in (folder / _BUNDLE).rglob("*") if p.is_file())
    model.save(str(folder / MLMODEL_FILE_NAME))


def load_model(model_uri: str, dst_path: str | None = None) -> Engine:
    """The engine of a model of this flavour: `engine({"input": array})` answers the outputs by name. Any model URI that
    MLflow knows (`models:/name@alias`, `models:/name/3`, `runs:/…`, a folder)."""
    local = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=dst_path))
    flavors = Model.load(str(local / MLMODEL_FILE_NAME)).flavors
    if FLAVOR_NAME not in flavors:
        raise AnnealError(
            "not_an_engine",
            f"{model_uri} has the flavours {', '.join(sorted(flavors))} and not {FLAVOR_NAME!r}.",
            remedy="Optimize it first: anneal_client.mlflow.optimize(client, model_uri).",
        )
    return Engine(local / flavors[FLAVOR_NAME]["data"])


def signature_of(manifest: Mapping[str, Any]) -> Any:
    """The model's signature by the bundle's manifest: a tensor by name for each input and output, -1 for sizes that may
    differ. None where a tensor has a type that numpy, and so MLflow, does not know (bfloat16, float8)."""
    try:
        inputs, outputs = ([_tensor(t) for t in manifest[side]] for side in ("inputs", "outputs"))
    except TypeError:
        return None
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs))


def _tensor(told: Mapping[str, Any]) -> Any:
    dtype = np.dtype("str" if told["dtype"] == "string" else told["dtype"])
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in told["shape"] or ())
    return TensorSpec(dtype, shape, name=told["name"])


def _unpacked(bundle: Path, folder: Path) -> dict[str, Any]:
    """Unpack the archive and answer its manifest."""
    if not zipfile.is_zipfile(bundle):
        raise AnnealError(
            "not_a_bundle", f"{bundle} is no bundle.", remedy="Give the .zip of Client.download_bundle()."
        )
    with zipfile.ZipFile(bundle) as archive:
        names = set(archive.namelist())
        if not {"infer.py", "manifest.json"} <= names:
            raise AnnealError("not_a_bundle", f"{bundle} holds no infer.py with a manifest.json.")
        folder.mkdir(parents=True)
        archive.extractall(folder)  # drops absolute paths and ".." by itself
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def _write_environment(folder: Path, pip_requirements: Sequence[str] | None) -> None:
    """The three files in which MLflow looks for what a model needs."""
    needed = pip_requirements
    if needed is None:
        told = (folder / _BUNDLE / "requirements.txt").read_text(encoding="utf-8").split()
        own = [line for line in told if line.split("==")[0] not in _SERVERS]
        needed = [f"mlflow=={mlflow.__version__}", *own]
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")
    python = platform.python_version()
    # YAML's flow style is JSON.
    conda = {"name": "mlflow-env", "channels": ["conda-forge"]}
    conda_env = {**conda, "dependencies": [f"python={python}", "pip", {"pip": list(needed)}]}
    (folder / "conda.yaml").write_text(json.dumps(conda_env, indent=2) + "\n", encoding="utf-8")
    python_env = {
        "python": python,
        "build_dependencies": ["pip", "setuptools", "wheel"],
        "dependencies": ["-r requirements.txt"],
    }
    (folder / "python_env.yaml").write_text(json.dumps(python_env, indent=2) + "\n", encoding="utf-8")
