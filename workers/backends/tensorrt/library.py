"""TensorRT and TensorRT for RTX: two libraries of one backend package. All that differs between them stands here.

Their API is the same but for a few names. TensorRT builds for the GPU at hand, and measures its tactics there: a timing
cache keeps what it found. TensorRT for RTX builds for a list of compute capabilities, without a GPU and without
measuring; a plan is compiled for the device when it is first loaded, and a runtime cache keeps that. Nothing of either
was run on a GPU by this service yet.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import TENSORRT_PLAN, TENSORRT_RTX_PLAN

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class Library:
    """`name`: of the backend, and of the extra that installs it. `module`: its import name. `prefix`: of its
    candidates' ids. `distributions`: their versions are part of a stage's key. `capabilities`: compute capability → its
    member of `ComputeCapability`, of those that it builds for; empty: it builds on the GPU and for it."""

    name: str
    title: str
    module: str
    prefix: str
    engine_format: str
    distributions: tuple[str, ...]
    capabilities: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_gpu(self) -> bool:
        """Whether its builder needs a GPU."""
        return not self.capabilities

    @property
    def keeps_timings(self) -> bool:
        """Whether its builds measure tactics, which a timing cache keeps."""
        return self.needs_gpu

    @property
    def compiles_when_loaded(self) -> bool:
        """Whether a runtime cache keeps what loading compiles, and the runtime replays CUDA graphs by itself."""
        return not self.needs_gpu

    def installed(self) -> bool:
        """Whether its Python package is there; imports nothing."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except (ImportError, ValueError):
            return self.module in sys.modules

    def load(self) -> Any:
        """Its module; raises StageFailure(`tensorrt_unavailable`) that names the extra to install."""
        try:
            return importlib.import_module(self.module)
        except Exception as error:  # a missing libnvinfer is an ImportError or an OSError
            raise StageFailure(
                "tensorrt_unavailable",
                f"{self.title} cannot be imported: {type(error).__name__}: {str(error)[:300]}",
                FailureKind.INFRASTRUCTURE,
                remedy=f"Install it with pip install 'anneal[{self.name}]' (docs/gpu.md says which versions fit each "
                "other).",
                cacheable=False,
            ) from error

    def version(self) -> str:
        """Raises StageFailure(`tensorrt_unavailable`)."""
        return str(self.load().__version__)

    def register_plugins(self, logger: tensorrt.ILogger) -> None:
        """Those that come with the library: its parser makes some operators of them (NonZero, ROI pooling), and loads
        their plans with them. Once per process; again costs nothing."""
        self.load().init_libnvinfer_plugins(logger, "")

    def builds_for(self, capability: str) -> bool:
        return self.needs_gpu or capability in self.capabilities

    def set_target(self, config: tensorrt.IBuilderConfig, capability: str) -> None:
        """Have it build for GPUs of this compute capability, where it does not build for the one at hand."""
        if self.capabilities:
            rtx: Any = config  # names that TensorRT's binding has not
            rtx.num_compute_capabilities = 1
            rtx.set_compute_capability(getattr(self.load().ComputeCapability, self.capabilities[capability]), 0)

    def new_context(
        self, engine: tensorrt.ICudaEngine, *, cuda_graph: bool, cached: bytes
    ) -> tuple[tensorrt.IExecutionContext | None, Any]:
        """An execution context, and the runtime cache that must outlive it (None: there is none), filled from `cached`
        where that fits."""
        if not self.compiles_when_loaded:
            return engine.create_execution_context(), None
        strategies = self.load().CudaGraphStrategy
        rtx: Any = engine
        config = rtx.create_runtime_config()
        cache = config.create_runtime_cache()
        if cached:
            cache.deserialize(cached)  # False for another version's or another GPU's: then it is empty
        config.set_runtime_cache(cache)
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
        return rtx.create_execution_context(config), cache


TENSORRT = Library(
    "tensorrt", "TensorRT", "tensorrt", "trt", TENSORRT_PLAN, ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
)
RTX = Library(
    "tensorrt-rtx",
    "TensorRT for RTX",
    "tensorrt_rtx_bindings",
    "rtx",
    TENSORRT_RTX_PLAN,
    ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs"),
    # Its runtime says what it runs on: 8.0, 8.6, 8.9 and 12.x. It refuses 9.0 (H100, H200).
    {"8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121"},
)
LIBRARIES = {library.name: library for library in (TENSORRT, RTX)}
