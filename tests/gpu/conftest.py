"""Tests that need an NVIDIA GPU: `python -m pytest tests/gpu` on one. Elsewhere each is skipped, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.domain.failures import StageFailure
from tests.gpu.models import Case, make_case
from workers import kernel
from workers.devices.cuda import runtime as cuda_runtime
from workers.hardware import describe


@pytest.fixture(scope="session")
def gpu() -> dict[str, Any]:
    """The hardware description of this machine; skips without a usable GPU."""
    try:
        cuda_runtime.probe()
    except StageFailure as failure:
        pytest.skip(failure.detail)
    return describe()


@pytest.fixture(params=["pycuda", "cuda-bindings"])
def cuda(request: pytest.FixtureRequest, gpu: dict[str, Any]) -> Iterator[cuda_runtime.Cuda]:
    """The CUDA interface by each of its libraries, with the context current."""
    try:
        opened = cuda_runtime.Cuda(library=request.param)
    except StageFailure as failure:
        pytest.skip(failure.detail)
    with opened.context():
        yield opened
    opened.close()


@pytest.fixture(scope="session")
def ort_cuda(gpu: dict[str, Any]) -> kernel.Backend:
    backend = kernel.backends()["onnxruntime-cuda"]()
    if backend.probe(gpu) is None:
        pytest.skip("ONNX Runtime has no CUDA provider here: onnxruntime-gpu is not installed")
    return backend


@pytest.fixture(scope="session", params=["residual_cnn", "vit", "bert"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return make_case(request.param, folder)
