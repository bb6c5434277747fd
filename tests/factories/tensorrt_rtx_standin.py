"""What only a GPU can do of TensorRT for RTX, load and run, on the stand-in for TensorRT: the names that the two do not
share. `tests/unit/test_trt_rtx_runtime.py` checks them against the real library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.factories import cuda_standin, tensorrt_standin
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
        found = super().deserialize_cuda_engine(serialized_engine)
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


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[tensorrt_standin.Behaviour]:
    """A machine with an L4 and TensorRT for RTX."""
    module = ModuleType(RTX.module)
    vars(module).update({k: v for k, v in vars(tensorrt_standin).items() if not k.startswith("__")})
    vars(module).update({cls.__name__: cls for cls in OWN})
    module.__version__ = VERSION  # type: ignore[attr-defined]
    seen.clear()
    with cuda_standin.installed(monkeypatch, folder) as behaviour:
        monkeypatch.setitem(sys.modules, RTX.module, module)
        monkeypatch.setattr(trt_probe, "ask_driver", lambda: dict(GPU))
        trt_probe.probe_gpu.cache_clear()
        yield behaviour
