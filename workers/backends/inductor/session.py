"""A compiled program that runs: arrays in, arrays out, on a CPU or a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import StageFailure
from workers.backends.inductor import caching
from workers.backends.inductor.graphs import OnGpu
from workers.backends.inductor.library import failure, library, open_package, target
from workers.backends.inductor.options import RuntimeOptions
from workers.backends.inductor.sidecar import PACKAGE_FILE, Sidecar, read_verified, require_compatible
from workers.graph.exported_program import quiet
from workers.graph.interface import Interface
from workers.kernel import Session

if TYPE_CHECKING:
    from workers.kernel import Arrays

    Runner = Callable[[list[Any]], Sequence[Any]]  # tensors by position, on the engine's device

_PROFILE_RUNS = 20


def load_session(engine: Path, runtime: RuntimeOptions, device: str) -> InductorSession:
    """Verify, then load. Raises StageFailure: `engine_untrusted`, `engine_incompatible`, `engine_key_missing`,
    `load_failed`, `out_of_memory`, `gpu_out_of_memory`, `backend_unavailable`."""
    sidecar, interface = read_verified(engine, runtime.form)  # before anything of the engine is looked at
    torch = library()
    require_compatible(sidecar, target(device))
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    exact_products(torch, sidecar.precision)
    try:
        with quiet():
            if runtime.form == "package":
                runner: Runner = open_package(engine / PACKAGE_FILE).run
            else:
                runner = caching.load(engine)
    except StageFailure:
        raise
    except Exception as error:  # of the loader or the linker
        raise failure("load_failed", error, remedy="Build the engine again.") from error
    if device == "cuda":
        return CudaSession(torch, runner, sidecar, interface, runtime)
    return InductorSession(torch, runner, sidecar, interface)


def exact_products(torch: Any, precision: str) -> None:
    """What is fp32 is computed in float32: no TF32 in cuDNN, which torch allows by default."""
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


class InductorSession(Session):
    """Compiled code reads what it was compiled for and checks nothing: sizes and types are checked here, before."""

    def __init__(self, torch: Any, runner: Runner, sidecar: Sidecar, interface: Interface) -> None:
        self._torch, self._runner, self._sidecar = torch, runner, sidecar
        self.inputs = interface.inputs
        self.outputs = interface.outputs
        self._specs = {spec.name: spec for spec in interface.inputs}

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name, as arrays of their own. `feeds`: one array per input, of its dtype; raises
        StageFailure(`inference_failed`, `out_of_memory`)."""
        return self._owned(self.raw(feeds))

    def raw(self, feeds: Arrays) -> Arrays:
        """As `run`, but for outputs that lie in memory of the engine's own."""
        self._check(feeds)
        return self._named(self._guarded(self._runner, self._tensors(feeds)))

    def call(self, feeds: Arrays) -> Callable[[], Any]:
        """As `run` in `script`: checked, made tensors, computed, and made arrays again."""
        return lambda: self.run(feeds)

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        self._check(feeds)
        tensors, runner = self._tensors(feeds), self._runner

        def call() -> None:
            self._guarded(runner, tensors)

        return call

    def close(self) -> None:
        vars(self).pop("_runner", None)

    def _tensors(self, feeds: Arrays) -> list[Any]:
        arrays = [np.asarray(feeds[name], order="C") for name in self._sidecar.order]
        # A tensor may be written to, as far as torch knows.
        return [self._torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]

    def _guarded(self, runner: Runner, tensors: list[Any]) -> Sequence[Any]:
        try:
            with self._torch.no_grad():
                return runner(tensors)
        except Exception as error:  # RuntimeError of the compiled code, and classes of torch's own
            raise failure("inference_failed", error) from error

    def _named(self, outputs: Sequence[Any]) -> Arrays:
        if len(outputs) != len(self.outputs):
            raise StageFailure("inference_failed", f"The engine gave {len(outputs)} outputs of {len(self.outputs)}.")
        return {spec.name: tensor.numpy() for spec, tensor in zip(self.outputs, outputs, strict=True)}

    def _owned(self, found: Arrays) -> Arrays:
        for name in self._sidecar.fixed:
            found[name] = found[name].copy()
        return found

    def _check(self, feeds: Mapping[str, Any]) -> None:
        """Raises StageFailure(`inference_failed`) for what the code was not compiled for."""
        sizes: dict[str, int] = {}
        for name in feeds:
            if name not in self._specs:
                raise _wrong(name, f"The model has no input {name!r}; it has {', '.join(self._specs) or 'none'}.")
        for name, spec in self._specs.items():
            if name not in feeds:
                raise _wrong(name, f"Input {name!r} is missing.")
            array = feeds[name]
            if str(array.dtype) != spec.dtype:
                raise _wrong(name, f"Input {name!r} is {array.dtype}, the model's is {spec.dtype}.")
            if len(array.shape) != len(spec.shape):
                raise _wrong(name, f"Input {name!r} has {len(array.shape)} axes, the model's has {len(spec.shape)}.")
            limits = self._sidecar.ranges[name]
            for axis, (size, dim, (least, most)) in enumerate(zip(array.shape, spec.shape, limits, strict=True)):
                if (least is not None and size < least) or (most is not None and size > most):
                    raise _wrong(
                        name,
                        f"Input {name!r} has size {size} on axis {axis}; the program was exported for "
                        f"{least or 0} to {'any' if most is None else most}.",
                    )
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise _wrong(name, f"Input {name!r} has size {size} on axis {axis}; {dim} is {sizes[dim]} before.")


class CudaSession(InductorSession):
    """On a GPU: arrays are copied there and back, and with `cuda_graph` all kernels are launched at once."""

    def __init__(
        self, torch: Any, runner: Runner, sidecar: Sidecar, interface: Interface, runtime: RuntimeOptions
    ) -> None:
        self._gpu = OnGpu(torch, runner, graphs=runtime.cuda_graph)
        super().__init__(torch, self._gpu.from_host, sidecar, interface)

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """The call on inputs that lie on the GPU and outputs that stay there; it returns when the GPU is done."""
        return self.bound(feeds)

    def bound(self, feeds: Arrays, *, wait: bool = True) -> Callable[[], Any]:
        """As `bind`; without `wait` the call returns once the work is submitted."""
        self._check(feeds)
        placed = self._guarded(self._gpu.placed, self._tensors(feeds))
        synchronize = self._torch.cuda.synchronize

        def work(tensors: list[Any]) -> Sequence[Any]:
            found = self._gpu.on_device(tensors)
            if wait:
                synchronize()
            return found

        def call() -> None:
            self._guarded(work, list(placed))

        return call

    def profile(self, feeds: Arrays) -> Mapping[str, Any] | None:
        """Medians in ms by CUDA events: `h2d_ms`, `compute_ms`, `d2h_ms`, `latency_ms` (their sum), and `enqueue_ms`,
        the CPU's time to submit the work; and `gpu_memory_mb`, what torch holds on the device."""
        self._check(feeds)
        cuda, host = self._torch.cuda, self._tensors(feeds)
        rows = []
        for _ in range(_PROFILE_RUNS + 3):
            marks = [cuda.Event(enable_timing=True) for _ in range(4)]
            marks[0].record()
            placed = self._gpu.placed(host)
            marks[1].record()
            start = time.perf_counter()
            found = self._guarded(self._gpu.on_device, list(placed))
            enqueue = time.perf_counter() - start
            marks[2].record()
            for tensor in found:
                tensor.to("cpu", non_blocking=True)
            marks[3].record()
            cuda.synchronize()
            steps = [a.elapsed_time(b) for a, b in pairwise(marks)]
            rows.append([*steps, sum(steps), enqueue * 1e3])
        names = ("h2d_ms", "compute_ms", "d2h_ms", "latency_ms", "enqueue_ms")
        medians = np.median(np.asarray(rows[3:]), axis=0)
        figures = {name: round(float(v), 4) for name, v in zip(names, medians, strict=True)}
        return {**figures, "gpu_memory_mb": round(cuda.memory_reserved() / 1e6, 1), "runs": _PROFILE_RUNS}

    def close(self) -> None:
        self._gpu.close()
        super().close()


def _wrong(tensor: str, detail: str) -> StageFailure:
    return StageFailure(
        "inference_failed", detail, tensor=tensor, remedy="Feed arrays of the model's types and shapes."
    )
