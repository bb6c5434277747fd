"""The engine that ships and its bundle, made as soon as the engine is proven."""

from __future__ import annotations

import re

from workers.pipeline.evaluate import SEED, WEIGHTS, Data
from workers.pipeline.outcome import Proof, nodes_kept
from workers.pipeline.runner import Outcome, StageRunner


def package(runner: StageRunner, proof: Proof, data: Data) -> Outcome:
    """The stage `package` of what ships. What was found out must not be lost for a few seconds: it may take what it
    needs, whatever the budget says."""
    picked = proof.picked
    built = picked.build if picked else None
    engine_format = built.data["engine_format"] if built else "onnx"
    inputs = {"engine": proof.engine}
    if data.validation is not None:
        inputs["data"] = data.validation
    manifest = {
        "engine": {
            "candidate": proof.verdict.picked,
            "backend": proof.backend,
            "format": engine_format,
            "precision": proof.precision,
            "runtime": proof.runtime,
            "files": proof.engine.to_json(),
            "nodes_kept": nodes_kept(picked),
        },
        "model": {"name": proof.model.name, "sha256": proof.model.sha256},
        "inputs": proof.export.data["inputs"],
        "outputs": proof.export.data["outputs"],
        "hardware": dict(proof.hardware),
        "versions": built.libraries if built else proof.benchmark.libraries,
    }
    options = {
        "name": f"{slug(proof.model.name)}-{proof.precision}",
        "backend": proof.backend,
        "runtime": proof.runtime,
        "engine_format": engine_format,
        "manifest": manifest,
        "shapes": data.shapes,
        "seed": SEED,
    }
    return runner.run("package", inputs, options, weight=WEIGHTS["package"])


def slug(name: str) -> str:
    """A file name's stem that is safe everywhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80] or "model"
