"""TensorRT and TensorRT for RTX on NVIDIA GPUs: an engine is a plan, native code for one version and one GPU or compute
capability, with a signed sidecar. What differs between the two libraries stands in `library`."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from app.domain.failures import StageFailure
from workers.artifacts import ONNX
from workers.backends.options import parsed
from workers.backends.tensorrt import build as building
from workers.backends.tensorrt import examine, messages
from workers.backends.tensorrt import recipes as trt_recipes
from workers.backends.tensorrt.compiled import Compiled
from workers.backends.tensorrt.cuda import open_cuda
from workers.backends.tensorrt.graph import precisions_of
from workers.backends.tensorrt.library import RTX, TENSORRT, Library
from workers.backends.tensorrt.options import BuildOptions, RuntimeOptions
from workers.backends.tensorrt.probe import probe_gpu, require_gpu
from workers.backends.tensorrt.runner import TensorRtSession
from workers.backends.tensorrt.script import infer_script
from workers.backends.tensorrt.serving import in_triton
from workers.backends.tensorrt.sidecar import check_compatible, read_verified
from workers.candidates import Candidate, Case, Proposal, Target
from workers.examined import Examined
from workers.kernel import Backend, BackendInfo, LayerTime, Reporter, Session, TensorSpec
from workers.serving.native import Instances, InTriton

if TYPE_CHECKING:
    from workers.kernel import Arrays


class _Plans(Backend):
    """Engine = `engine.plan`, and `engine.json` that says what it was built with and for."""

    library: ClassVar[Library]
    device: ClassVar[str] = "cuda"
    signed: ClassVar[bool] = True
    stops: ClassVar[bool] = True
    script_libraries: ClassVar[tuple[str, ...]] = ("pycuda", "ml-dtypes")

    def probe(self, hardware: Mapping[str, Any]) -> BackendInfo | None:  # noqa: ARG002  (it asks the driver itself)
        """None without the library, a driver or a GPU. Asks the driver in a child process, so that the worker may go on
        forking, and makes no TensorRT object."""
        if not self.library.installed():
            return None
        gpu = probe_gpu()
        if isinstance(gpu, str) or not self.library.builds_for(gpu.compute_capability):
            return None
        try:
            version = self.library.version()
        except Exception:  # a broken installation must not take the worker down
            return None
        precisions = precisions_of(gpu.compute_capability)
        versions = {"tensorrt": version, "cuda": gpu.cuda, "driver": gpu.driver}
        return BackendInfo(self.name, {k: v for k, v in versions.items() if v}, ("cuda",), precisions)

    def targets(self, hardware: Mapping[str, Any]) -> Sequence[Target]:  # noqa: ARG002
        """Those of TensorRT for RTX, whose builder needs no GPU."""
        if not self.library.installed():
            return ()
        return tuple(
            Target(found, precisions_of(found), {"gpu": {"compute_capability": found}})
            for found in self.library.capabilities
        )

    @classmethod
    def built_for(cls, options: Mapping[str, Any]) -> str | None:
        target = None if cls.library.needs_gpu else options.get("target")
        return None if target is None else str(target)

    def propose(self, case: Case) -> Proposal:
        return trt_recipes.propose(case, self.library)

    def variants(self, case: Case, candidate: Candidate) -> Sequence[Candidate]:  # noqa: ARG002
        return trt_recipes.variants(candidate)

    def with_threads(self, runtime: Mapping[str, Any], threads: int) -> dict[str, Any]:  # noqa: ARG002
        """As it is: the work does not run on CPU threads."""
        return dict(runtime)

    def build(
        self,
        model: Path,
        out: Path,
        options: Mapping[str, Any],
        reporter: Reporter,
        kind: str = ONNX,  # noqa: ARG002  (the one that it accepts)
    ) -> dict[str, Any]:
        """`options`: `BuildOptions`; the failures and what is returned are `building.build`'s."""
        return building.build(self.library, model, out, parsed(BuildOptions, options, "TensorRT"), reporter)

    def load(self, engine: Path, runtime: Mapping[str, Any]) -> Session:
        """Verify, then load. Raises StageFailure: `engine_untrusted`, `engine_incompatible`, `load_failed`,
        `gpu_unavailable`, `tensorrt_unavailable`, `cuda_unavailable`, `gpu_out_of_memory`,
        `invalid_backend_options`."""
        return self._load(engine, runtime)

    def _load(self, engine: Path, runtime: Mapping[str, Any]) -> TensorRtSession:
        options = parsed(RuntimeOptions, runtime, "TensorRT")
        sidecar, content = read_verified(engine)  # before anything of the engine is looked at
        gpu = require_gpu()  # before TensorRT's runtime is made: without a driver it takes the process down
        library, version = self.library, self.library.version()
        check_compatible(sidecar, version, gpu, library)
        specs = {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in _io_of(sidecar)}
        cuda = open_cuda()
        with ExitStack() as opening:
            opening.callback(cuda.close)
            opening.enter_context(cuda.context())
            log = messages.Log()
            logger = messages.make_logger(library, log)
            library.register_plugins(logger)
            made = messages.guarded("start its runtime", log, lambda: library.load().Runtime(logger))
            # Plans of this service hold no host code (no plugins, no lean runtime): TensorRT shall refuse it.
            made.engine_host_code_allowed = False
            plan = made.deserialize_cuda_engine(content)
            if plan is None:
                raise messages.load_failure(log)
            opened = ExitStack()
            try:
                compiled = Compiled.of(library, version, gpu)
                session = TensorRtSession(library, made, plan, cuda, log, options, specs, opened, compiled)
            except StageFailure as failure:
                # TensorRT's objects go before their CUDA context, and a traceback would keep them longer.
                del plan, made
                traceback.clear_frames(failure.__traceback__)
                gc.collect()
                raise
            del plan, made
            opened.callback(id, logger)  # kept until then: TensorRT's objects hold no reference to their logger
            opened.push(opening.pop_all())
            opened.callback(gc.collect)  # runs first: what is freed after its context was left may crash
            return session

    def layer_times(self, engine: Path, runtime: Mapping[str, Any], feeds: Arrays, runs: int) -> list[LayerTime] | None:
        session = self._load(engine, {**runtime, "cuda_graph": False})  # a replayed graph tells nothing of its layers
        try:
            return session.layer_times(feeds, runs)
        finally:
            session.close()

    def examines(self, hardware: Mapping[str, Any]) -> bool:  # noqa: ARG002  (it asks the driver itself)
        """Where its parser can be asked: that of TensorRT for RTX without a GPU."""
        return examine.possible(self.library)

    def examine(self, model: Path, scratch: Path, reporter: Reporter, seconds: float) -> Examined:
        return examine.examine(self.library, model, scratch, reporter, seconds)

    def in_triton(self, instances: Instances) -> InTriton:
        return in_triton(self.library, instances.engine, parsed(RuntimeOptions, instances.runtime, "TensorRT"))

    def infer_script(self, runtime: Mapping[str, Any]) -> str:
        info = self.probe({})
        return infer_script(runtime, info.versions["tensorrt"] if info else "any version", self.library)


class TensorRtBackend(_Plans):
    library: ClassVar[Library] = TENSORRT
    name: ClassVar[str] = TENSORRT.name
    # What is not installed of these is no part of a key.
    libraries: ClassVar[tuple[str, ...]] = (*TENSORRT.distributions, "numpy")
    engine_format: ClassVar[str] = TENSORRT.engine_format
    shares_cache: ClassVar[bool] = TENSORRT.keeps_timings
    uses_cache: ClassVar[bool] = True


class TensorRtRtxBackend(_Plans):
    library: ClassVar[Library] = RTX
    name: ClassVar[str] = RTX.name
    libraries: ClassVar[tuple[str, ...]] = (*RTX.distributions, "numpy")
    engine_format: ClassVar[str] = RTX.engine_format
    shares_cache: ClassVar[bool] = RTX.keeps_timings
    uses_cache: ClassVar[bool] = True


def _io_of(sidecar: Mapping[str, Any]) -> list[tuple[str, str, list[int | str]]]:
    return [(name, dtype, shape) for name, dtype, shape in (*sidecar["inputs"], *sidecar["outputs"])]
