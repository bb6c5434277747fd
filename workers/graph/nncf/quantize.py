"""Post-training int8 quantization by NNCF (Neural Network Compression Framework) of an OpenVINO model."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import numpy as np

from app.domain.failures import FailureKind, StageFailure, model_failure
from workers.graph.ir.faults import first_call_decides
from workers.graph.ir.files import keep_reduced_axes
from workers.graph.ir.library import clean_message, library

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
Method = Literal["auto", "minmax", "percentile", "histogram"]

# What NNCF quantizes around; a product, a convolution or a lookup on integers is what makes a model int8.
COMPUTE = ("MatMul", "Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData")
_DEEPEST = 8
_WEIGHTS = ("Constant", "FakeQuantize", "Convert", "Subtract", "Multiply", "Reshape", "Transpose")
# NNCF quantizes their weights, which OpenVINO's CPU kernels refuse.
_RECURRENT = ("LSTMSequence", "GRUSequence", "RNNSequence", "LSTMCell", "GRUCell", "RNNCell")
QUANTIZERS = ("FakeQuantize", "FakeConvert")
# What NNCF moves its quantizers through (its QUANTIZE_AGNOSTIC_OPERATIONS, and Concat): they only move values.
MOVES = (
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Concat", "Pad", "Tile", "Broadcast"),
    *("MaxPool", "AdaptiveMaxPool", "ReduceMax", "Minimum", "Maximum", "StridedSlice", "ShuffleChannels"),
    *("Gather", "GatherND", "GatherElements", "ScatterUpdate", "ScatterNDUpdate", "ScatterElementsUpdate"),
    *("DepthToSpace", "SpaceToDepth", "BatchToSpace", "SpaceToBatch", "Convert", "ConvertLike"),
)
# They only move values, or vanish into their neighbours: counting them would tell nothing.
PASSIVE = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Convert", "ShapeOf", "BatchNormInference")


class _Stream:
    """The samples as NNCF reads them: any number of passes, one sample (or fixed batch) at a time."""

    def __init__(self, batches: Callable[[], Iterable[Feeds]], size: int, progress: Callable[[float], None]) -> None:
        self._batches, self._size, self._progress = batches, size, progress
        self._passes = 0

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self._passes += 1
        done = 1 - 0.5 ** (self._passes - 1)  # how many passes there will be is NNCF's to know: each gets half the rest
        for index, feeds in enumerate(self._batches()):
            self._progress(done + 0.5**self._passes * index / self._size)
            yield dict(feeds)

    def __len__(self) -> int:
        return self._size


def quantize(
    model: Any,
    batches: Callable[[], Iterable[Feeds]],
    size: int,
    *,
    preset: Literal["performance", "mixed"],
    model_type: Literal["transformer"] | None,
    method: Method,
    smooth_quant_alpha: float | None,
    fast_bias_correction: bool,
    excluded: Collection[str],
    progress: Callable[[float], None],
) -> Any:
    """The model with FakeQuantize nodes and int8 weights.

    `batches()` starts a new pass over the data, which has `size` items of the model's inputs by name; one item is held
    at a time. `method`: how the range of an activation follows from the samples: `auto` is NNCF's choice (the mean of
    the samples' extremes for per-tensor ranges), `minmax` the extremes over all, `percentile` the mean of the samples'
    0.01 % and 99.99 % quantiles, `histogram` the range with the least rounding error over a running histogram.
    `excluded`: names of OpenVINO nodes. Raises StageFailure: `quantization_failed`, `nncf_missing`.
    """
    keep_reduced_axes(model)
    recurrent = (n.get_friendly_name() for n in model.get_ops() if n.get_type_name() in _RECURRENT)
    ignored = sorted({*excluded, *recurrent})
    with _quiet(), _without_torch():
        try:
            import nncf
        except ImportError as error:
            raise StageFailure(
                "nncf_missing",
                "NNCF is not installed on this worker.",
                FailureKind.INFRASTRUCTURE,
                remedy="Install the extra `openvino` on the worker.",
                cacheable=False,
            ) from error
        nncf.set_log_level(logging.CRITICAL)
        try:
            with _without_snippets() if first_call_decides(model) else contextlib.nullcontext():
                return nncf.quantize(
                    model,
                    nncf.Dataset(_Stream(batches, size, progress)),
                    preset=nncf.QuantizationPreset(preset),
                    target_device=nncf.TargetDevice.CPU,
                    subset_size=size,
                    fast_bias_correction=fast_bias_correction,
                    model_type=nncf.ModelType(model_type) if model_type else None,
                    ignored_scope=nncf.IgnoredScope(names=ignored, validate=False) if ignored else None,
                    advanced_parameters=_advanced(nncf, method, smooth_quant_alpha),
                )
        except (StageFailure, MemoryError):
            raise
        except Exception as error:  # NNCF raises classes of its own, RuntimeError, KeyError, AttributeError, …
            raise model_failure(
                "quantization_failed",
                f"NNCF does not take this model: {type(error).__name__}: {clean_message(error)}",
                remedy="Use another int8 recipe or another precision for this model.",
            ) from error


def _advanced(nncf: Any, method: Method, alpha: float | None) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Known

    options: dict[str, Any] = {}
    ranges = {"minmax": Known.MINMAX, "percentile": Known.MEAN_QUANTILE, "histogram": Known.HISTOGRAM}
    if method in ranges:
        options["activations_range_estimator_params"] = ranges[method]
    if alpha is not None:
        options["smooth_quant_alphas"] = nncf.AdvancedSmoothQuantParameters(matmul=alpha)
    return nncf.AdvancedQuantizationParameters(**options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, log lines and warnings, which tell a service's log nothing."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _without_snippets() -> Iterator[None]:
    """NNCF compiles the model itself, and has no option for the plug-in's properties: where a first sample of length 1
    would spoil what it sees of all others, they are set behind its back."""
    core = library().Core
    compile_model = core.compile_model

    def compiled(self: Any, model: Any, device_name: str, config: Mapping[Any, Any] | None = None) -> Any:
        return compile_model(self, model, device_name, {**(config or {}), "SNIPPETS_MODE": "DISABLE"})

    core.compile_model = compiled
    try:
        yield
    finally:
        core.compile_model = compile_model


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """NNCF imports torch, where it is installed, to ask whether the model is one of its own: 200 MB and over a second.
    It takes a missing one for a no."""
    modules = cast("dict[str, Any]", sys.modules)
    if "torch" in modules:
        yield
        return
    modules["torch"] = None
    try:
        yield
    finally:
        del modules["torch"]


def quantized_nodes(model: Any) -> dict[str, str]:
    """Name → type of the nodes that compute on quantized values: those that read a FakeQuantize; of products and
    convolutions those whose weights are quantized, too."""
    found: dict[str, str] = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in (*QUANTIZERS, *PASSIVE, "Result", "Parameter", "Constant") or not node.get_input_size():
            continue
        if kind in COMPUTE:
            if all(is_quantized_value(node.input_value(i)) for i in (0, 1)):
                found[node.get_friendly_name()] = kind
        elif node.input_value(0).get_node().get_type_name() in QUANTIZERS and _is_float(node):
            found[node.get_friendly_name()] = kind
    return found


def count_by_type(nodes: Mapping[str, str]) -> dict[str, int]:
    return dict(sorted(Counter(nodes.values()).items()))


def computes_on_integers(counts: Mapping[str, int]) -> bool:
    return any(counts.get(kind) for kind in (*COMPUTE, "Gather"))


def _is_float(node: Any) -> bool:
    return bool(node.get_output_element_type(0).is_real())


def is_quantized_value(value: Any, depth: int = 0) -> bool:
    """Whether a FakeQuantize, or 8-bit weights behind their scale, stand before this value."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind in QUANTIZERS:
        return True
    if kind == "Constant":
        return str(node.get_output_element_type(0).get_type_name()) in ("i8", "u8")
    if depth > _DEEPEST or kind not in (*_WEIGHTS, *MOVES):
        return False
    data = node.input_values() if kind == "Concat" else node.input_values()[:1]
    return any(is_quantized_value(before, depth + 1) for before in data)
