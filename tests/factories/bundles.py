"""A bundle that ships, made of a model as it is: what the stage `package` writes, without a job."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from tests.factories import onnx_models
from workers.kernel import backends
from workers.measure.synthetic import random_feeds
from workers.serving import shipped


def bundle(model: ModelProto, folder: Path, accepts: Mapping[str, Any] | None = None, **serving: Any) -> Path:
    """The folder that holds the .zip. `serving`: of its `serving.json`; without any there is none."""
    engine = onnx_models.folder(model, folder / "engine")
    backend = backends()["onnxruntime"]()
    session = backend.load(engine, {})
    shapes = {s.name: tuple(d if isinstance(d, int) else 1 for d in s.shape) for s in session.inputs}
    sample = random_feeds(list(session.inputs), shapes, 0)
    manifest = {
        "engine": {"precision": "fp32", "accepts": dict(accepts or {})},
        "inputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in session.inputs],
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in session.outputs],
    }
    session.close()
    (folder / "bundle").mkdir()
    np.savez(folder / "sample_input.npz", **sample)
    with zipfile.ZipFile(folder / "bundle" / "m-bundle.zip", "w") as archive:
        for path in engine.iterdir():
            archive.write(path, path.name)
        archive.write(folder / "sample_input.npz", "sample_input.npz")
        for name, source in shipped().items():
            archive.writestr(name, source)
        archive.writestr("infer.py", backend.infer_script({}))
        archive.writestr("manifest.json", json.dumps(manifest))
        if serving:
            archive.writestr("serving.json", json.dumps(serving))
    return folder / "bundle"
