"""Jobs that between them go through every stage that there is: for who kills a worker in one of them."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.factories import onnx_models
from tests.factories.plugins import install

Json = dict[str, Any]
_POINTS = {"anneal.backends": {"odd-steps": "odd_steps:OddSteps"}}
_BENCHMARK = {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True}
_ONNX = {"backends": ["onnxruntime"]}
_ODD = {"backends": ["odd-steps", "onnxruntime"]}
_FEATURES, _SAMPLES = 16, 120
_BUDGET_S = 300  # they take a tenth of it; but a busy machine takes its time
# Asked of a worker that has no job, by `GET /v1/models/{id}/compatibility`.
OF_QUESTIONS = frozenset({"compatibility"})


@dataclass(frozen=True)
class Route:
    """A kind of job. `stages`: those that it is there for. `model`: of a number, a file's name and its bytes, which no
    other number gives: nothing of them is known from another job. `data`: an .npz. `spec`: the rest of the job. `then`:
    of a number, a second model, which goes on with what the first one answers."""

    stages: frozenset[str]
    model: Callable[[int], tuple[str, bytes]]
    data: Callable[[int], bytes]
    spec: Mapping[str, Any]
    then: Callable[[int], tuple[str, bytes]] | None = None

    def models(self, number: int) -> list[tuple[str, bytes]]:
        return [made(number) for made in (self.model, self.then) if made is not None]

    def body(self, model_ids: Sequence[str], dataset_id: str) -> Json:
        """Of `POST /v1/jobs`."""
        model_id, *then = model_ids
        data = {"dataset_id": dataset_id}
        validation = {"max_accuracy_loss_percent": 100, **self.spec.get("validation", {}), **data}
        given = {"benchmark": _BENCHMARK, **self.spec, "validation": validation, "calibration": data}
        chain = {"chain": {"then": [{"model_id": m} for m in then], "deploy": "ensemble"}} if then else {}
        return {"model_id": model_id, **given, **chain}


def _perceptron(seed: int) -> tuple[str, bytes]:
    model = onnx_models.mlp(features=_FEATURES, hidden=64, classes=4, seed=seed)
    return f"net{seed}.onnx", model.SerializeToString()


def _block(seed: int) -> tuple[str, bytes]:
    return f"block{seed}.onnx", onnx_models.transformer_block(seed=seed).SerializeToString()


def _program(seed: int) -> tuple[str, bytes]:
    import torch

    from tests.factories import programs

    net = programs.brittle()
    with torch.no_grad():
        next(net.parameters()).add_(1e-4 * seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"net{seed}.pt2"
        programs.save(net, path, {"input": ("float32", ("batch", 1, 8, 8))}, {"batch": (1, 64)})
        return path.name, path.read_bytes()


def _encoder(seed: int) -> tuple[str, bytes]:
    from tests.factories import chains

    return f"encoder{seed}.onnx", chains.encoder(_FEATURES, 64, seed=seed).SerializeToString()


def _head(seed: int) -> tuple[str, bytes]:
    from tests.factories import chains

    return f"head{seed}.onnx", chains.head(64, seed=seed).SerializeToString()


def _npz(**arrays: Any) -> bytes:
    raw = io.BytesIO()
    np.savez(raw, **arrays)
    return raw.getvalue()


def _rows(seed: int) -> bytes:
    return _npz(input=np.random.default_rng(seed).normal(size=(_SAMPLES, _FEATURES)).astype(np.float32))


def _weighted(seed: int) -> bytes:
    chance = np.random.default_rng(seed)
    shapes = {"input": (_SAMPLES, _FEATURES), "weight": (_SAMPLES, 1)}
    return _npz(**{name: chance.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()})


def _texts(seed: int) -> bytes:
    ids = np.random.default_rng(seed).integers(0, 50, (_SAMPLES, 12))
    return _npz(input_ids=ids, attention_mask=np.ones_like(ids))


def _images(seed: int) -> bytes:
    return _npz(input=np.random.default_rng(seed).standard_normal((_SAMPLES, 1, 8, 8), dtype=np.float32))


_ALWAYS = ("export", "simplify", "reference_outputs", "quantize", "build", "validate", "benchmark", "package")
ROUTES = (
    Route(
        frozenset(_ALWAYS),
        _perceptron,
        _rows,
        {"target": _ONNX, "precisions": ["fp32", "int8"], "budget_seconds": _BUDGET_S},
    ),
    # What it is like to serve the engine.
    Route(
        frozenset({"load_test", "cold_start", "sweep", "profile"}),
        _perceptron,
        _rows,
        {
            "target": _ONNX,
            "precisions": ["fp32"],
            "traffic": {"rate_per_second": 20, "slo": {"p99_latency_ms": 500}},
            "budget_seconds": _BUDGET_S,
        },
    ),
    # An axis beside the batch is free.
    Route(
        frozenset({"shape_probes", "check_shapes"}),
        _block,
        _texts,
        {"target": _ONNX, "precisions": ["fp32"], "budget_seconds": _BUDGET_S},
    ),
    # No rounding is exact, and an engine may be asked for because it is small: what costs accuracy is looked for.
    Route(
        frozenset({"sensitivity"}),
        _perceptron,
        _rows,
        {
            "target": _ONNX,
            "precisions": ["int8"],
            "validation": {"metric": "normalized_error", "max_accuracy_loss_percent": 0},
            "constraints": {"max_size_mb": 100},
            "budget_seconds": _BUDGET_S,
        },
    ),
    Route(
        frozenset({"quantize_nncf"}),
        _perceptron,
        _rows,
        {"target": {"backends": ["openvino"]}, "precisions": ["int8"], "budget_seconds": _BUDGET_S},
    ),
    Route(
        frozenset({"convert", "equalize"}),
        _perceptron,
        _rows,
        {"target": _ODD, "precisions": ["fp32"], "budget_seconds": _BUDGET_S},
    ),
    Route(
        frozenset({"chain", "unchain"}),
        _encoder,
        _weighted,
        {"target": _ONNX, "precisions": ["fp32"], "budget_seconds": _BUDGET_S},
        _head,
    ),
    Route(
        frozenset({"observe"}),
        _program,
        _images,
        {"target": _ODD, "precisions": ["fp32"], "budget_seconds": _BUDGET_S},
    ),
    Route(
        frozenset({"train"}),
        _program,
        _images,
        {
            "target": _ONNX,
            "precisions": ["int8"],
            "validation": {"metric": "normalized_error"},
            "quantization": {"win_back": False, "training": {"mode": "always", "epochs": 4, "max_seconds": 30}},
            "budget_seconds": _BUDGET_S,
        },
    ),
)
ROUTE_OF: Mapping[str, Route] = {stage: route for route in ROUTES for stage in sorted(route.stages)}


def installed(site: Path) -> Path:
    """The folder to put into the workers' PYTHONPATH: some stages need a backend that asks for them."""
    site.mkdir(parents=True)
    install(site, "odd-steps", "0.1.0", _POINTS, Path(__file__).with_name("odd_steps.py"))
    return site
