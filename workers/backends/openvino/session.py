"""A compiled OpenVINO model that runs."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from app.domain.failures import StageFailure
from workers.graph.interface import Interface
from workers.graph.ir.library import library, runtime_failure
from workers.kernel import WARM_UP_RUNS, LayerTime, Session, TensorSpec
from workers.measure.layers import median_times

if TYPE_CHECKING:
    from workers.kernel import Arrays


class OpenVinoSession(Session):
    """Tensors go by position: names can be lost when OpenVINO rewrites a graph, the order is kept."""

    def __init__(self, compiled: Any, interface: Interface) -> None:
        self._compiled = compiled
        self._request: Any = None
        self.inputs = interface.inputs
        self.outputs = interface.outputs

    def run(self, feeds: Arrays) -> Arrays:
        """All outputs by name, as arrays of their own. `feeds`: one array per input, of its dtype; raises
        StageFailure(`inference_failed`)."""
        self._check(feeds)
        try:
            if self._request is None:
                self._request = self._compiled.create_infer_request()
            kept = self._set_inputs(self._request, feeds)
            self._request.infer(share_outputs=True)
            # The next inference writes over the request's own memory.
            values = [np.array(self._request.get_output_tensor(i).data) for i in range(len(self.outputs))]
            del kept
        except Exception as error:  # the binding raises RuntimeError and classes of its own
            raise runtime_failure("inference_failed", error) from error
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}

    def call(self, feeds: Arrays) -> Callable[[], Any]:
        """As `run` in `script`: tensors made of the arrays, one inference, copies of the outputs."""
        self._check(feeds)
        ov = library()
        try:
            if self._request is None:
                self._request = self._compiled.create_infer_request()
        except Exception as error:  # as in `run`
            raise runtime_failure("inference_failed", error) from error
        idle, inputs, outputs = [self._request], [i.name for i in self.inputs], [o.name for o in self.outputs]

        def call() -> Arrays:
            try:
                request = idle.pop()
                tensors = [ov.Tensor(np.asarray(feeds[name], order="C")) for name in inputs]
                for index, tensor in enumerate(tensors):
                    request.set_input_tensor(index, tensor)
                request.infer(share_outputs=True)
                found = {name: np.array(request.get_output_tensor(i).data) for i, name in enumerate(outputs)}
                idle.append(request)
                return found
            except Exception as error:  # as in `run`
                raise runtime_failure("inference_failed", error) from error

        return call

    def bind(self, feeds: Arrays) -> Callable[[], Any]:
        """An inference request of its own on inputs that share the arrays' memory; its outputs stay where OpenVINO
        put them: no copy, no conversion, only the model."""
        self._check(feeds)
        try:
            request = self._compiled.create_infer_request()
            kept = self._set_inputs(request, feeds)
        except Exception as error:  # as in `run`
            raise runtime_failure("inference_failed", error) from error
        infer = request.infer

        def call(_kept: Any = kept) -> None:
            try:
                infer(share_outputs=True)
            except Exception as error:  # as in `run`
                raise runtime_failure("inference_failed", error) from error

        return call

    def properties(self) -> dict[str, Any]:
        """What OpenVINO made of the options it was compiled with."""
        get = self._compiled.get_property
        return {
            "inference_precision": get("INFERENCE_PRECISION_HINT").get_type_name(),
            "num_streams": int(get("NUM_STREAMS")),
            "inference_num_threads": int(get("INFERENCE_NUM_THREADS")),
            "enable_cpu_pinning": bool(get("ENABLE_CPU_PINNING")),
            "enable_hyper_threading": bool(get("ENABLE_HYPER_THREADING")),
        }

    def layers(self) -> dict[str, int]:
        """How many of the layers that are executed compute in which type (u8 and i8: on integers)."""
        found: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            info = node.get_rt_info()
            if "runtimePrecision" in info and node.get_type_name() not in ("Parameter", "Result"):
                found[str(info["runtimePrecision"].value)] += 1
        return dict(sorted(found.items()))

    def layer_times(self, feeds: Arrays, runs: int) -> list[LayerTime]:
        """Of a model compiled with PERF_COUNT: medians of `runs` inferences after some to warm up."""
        request = self._compiled.create_infer_request()
        kept = self._set_inputs(request, feeds)
        for _ in range(WARM_UP_RUNS):
            request.infer(share_outputs=True)
        times: list[dict[tuple[str, str], float]] = []
        for _ in range(runs):
            request.infer(share_outputs=True)
            times.append(defaultdict(float))
            for layer in request.profiling_info:
                times[-1][layer.node_name, layer.node_type] += layer.real_time.total_seconds() * 1e3
        del kept
        return median_times(times)

    def close(self) -> None:
        self._request = self._compiled = None

    def _set_inputs(self, request: Any, feeds: Mapping[str, Any]) -> list[Any]:
        """The tensors, which have to live as long as the request uses them."""
        ov = library()
        tensors = []
        for index, spec in enumerate(self.inputs):
            array = np.ascontiguousarray(feeds[spec.name]).reshape(np.shape(feeds[spec.name]))
            # What has no bytes, or may not be written to, cannot be shared.
            shared = bool(array.size) and array.flags.writeable
            tensor = ov.Tensor(array, shared_memory=shared)
            request.set_input_tensor(index, tensor)
            tensors.append(tensor)
        return tensors

    def _check(self, feeds: Mapping[str, Any]) -> None:
        known = {spec.name for spec in self.inputs}
        for name in feeds:
            if name not in known:
                raise _wrong(name, f"The model has no input {name!r}; it has {', '.join(sorted(known)) or 'none'}.")
        for spec in self.inputs:
            if spec.name not in feeds:
                raise _wrong(spec.name, f"Input {spec.name!r} is missing.")
            array = feeds[spec.name]
            if str(array.dtype) != spec.dtype:
                raise _wrong(spec.name, f"Input {spec.name!r} is {array.dtype}, the model's is {spec.dtype}.")
            if not _fits(spec, array.shape):
                shape = ", ".join(map(str, spec.shape))
                raise _wrong(spec.name, f"Input {spec.name!r} has shape {list(array.shape)}, the model's is [{shape}].")


def _fits(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    return len(shape) == len(spec.shape) and all(
        isinstance(dim, str) or dim == have for dim, have in zip(spec.shape, shape, strict=True)
    )


def _wrong(tensor: str, detail: str) -> StageFailure:
    return StageFailure(
        "inference_failed", detail, tensor=tensor, remedy="Feed arrays of the model's types and shapes."
    )
