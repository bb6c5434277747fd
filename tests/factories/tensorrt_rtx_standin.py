"""What only a GPU can do of TensorRT for RTX, load and run, on the stand-in for TensorRT: the names that the two do not
share. `tests/unit/test_trt_rtx_runtime.py` checks them against the real library."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from tests.factories import cuda_standin, tensorrt_standin
from workers import installation
from workers.backends.tensorrt import probe as trt_probe
from workers.backends.tensorrt.library import RTX

VERSION = "1.7.1.116"
GPU = {**cuda_standin.GPU, "name": "NVIDIA L4", "compute_capability": "8.9", "memory_bytes": 24 << 30}
seen: list[Any] = []  # runtime configurations that contexts were made with


class CudaGraphStrategy(IntEnum):
    DISABLED, WHOLE_GRAPH_CAPTURE = range(2)


class ComputeCapability(IntEnum):
    SM80, SM86, SM89, SM120, SM121 = range(5)


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, cache: bytes) -> bool:
        self.content = bytes(cache)
        return True

    def serialize(self) -> Any:
        return tensorrt_standin._host_memory(self.content or b"compiled")


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        self._cache: IRuntimeCache | None = None

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self._cache = cache
        return True


class ICudaEngine(tensorrt_standin.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: Any = None) -> tensorrt_standin.IExecutionContext:
        assert isinstance(runtime_config, IRuntimeConfig)
        seen.append(runtime_config)
        return super().create_execution_context()


class Runtime(tensorrt_standin.Runtime):
    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview) -> ICudaEngine | None:
        """Also plans of the real builder, as long as the model of each was written down (`write_down`)."""
        found = _written_down(bytes(serialized_engine), self._logger) or super().deserialize_cuda_engine(
            serialized_engine
        )
        if found is not None:
            found.__class__ = ICudaEngine
        return found  # type: ignore[return-value]


class IBuilderConfig(tensorrt_standin.IBuilderConfig):
    num_compute_capabilities = 0

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        self._target = compute_capability
        return index < self.num_compute_capabilities


class Builder(tensorrt_standin.Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()


OWN = (
    CudaGraphStrategy,
    ComputeCapability,
    IRuntimeCache,
    IRuntimeConfig,
    ICudaEngine,
    Runtime,
    IBuilderConfig,
    Builder,
)


def _folder() -> Path | None:
    cache = installation.current().cache_dir
    return None if cache is None else cache / "standin-plans"


def any_written_down() -> bool:
    folder = _folder()
    return folder is not None and folder.exists()


def write_down(plan: bytes, model: Path, profiles: list[dict[str, Any]]) -> None:
    """Keep what a plan of the real builder was made of, for the stand-in's runtime."""
    folder = _folder()
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    name = hashlib.sha256(plan).hexdigest()
    (folder / f"{name}.json").write_text(json.dumps(profiles))
    onnx.save(onnx.load(model), folder / f"{name}.onnx")


def _written_down(plan: bytes, logger: tensorrt_standin.ILogger) -> tensorrt_standin.ICudaEngine | None:
    folder, name = _folder(), hashlib.sha256(plan).hexdigest()
    if folder is None or not (folder / f"{name}.onnx").exists():
        return None
    shapes = json.loads((folder / f"{name}.json").read_text())
    ranges = [{k: [v["min"], v["opt"], v["max"]] for k, v in profile.items()} for profile in shapes]
    return tensorrt_standin.ICudaEngine(onnx.load(folder / f"{name}.onnx"), ranges, logger)


def module() -> ModuleType:
    made = ModuleType(RTX.module)
    vars(made).update({k: v for k, v in vars(tensorrt_standin).items() if not k.startswith("__")})
    vars(made).update({cls.__name__: cls for cls in OWN})
    made.__version__ = VERSION  # type: ignore[attr-defined]
    return made


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[tensorrt_standin.Behaviour]:
    """A machine with an L4 and TensorRT for RTX."""
    seen.clear()
    with cuda_standin.installed(monkeypatch, folder) as behaviour:
        monkeypatch.setitem(sys.modules, RTX.module, module())
        monkeypatch.setattr(trt_probe, "ask_driver", lambda: dict(GPU))
        trt_probe.probe_gpu.cache_clear()
        yield behaviour
