"""OpenVINO's import, and what its messages say.

Both OpenVINO and NNCF report their use over the network through the package `openvino_telemetry`, OpenVINO already
while it is imported. They fall back to a stub where that package is missing: so it is made missing here, in this
process, before the first import.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from onnx import ModelProto

from app.domain.failures import StageFailure
from workers.graph.onnx_graph import all_nodes, node_label

# The conversion tool (`ovc`) is what reports the import; reading ONNX files does not need it.
_KEPT_OUT = ("openvino_telemetry", "openvino.tools.ovc")

_UNKNOWN_OPS = re.compile(r"No conversion rule found for operations: (.+?)(?: Conversion is failed|$)")
_FAILED_OPS = re.compile(r"Conversion is failed for: (.+?)$")
_NODE_PATTERNS = (
    re.compile(r"Operation name: (?P<node>\S+)"),
    re.compile(r"While validating ONNX node '<Node\(\w+\): (?P<output>[^>]*)>'"),
    re.compile(r"with friendly_name '(?P<node>[^']*)'"),
    re.compile(r"\[cpu\]\s*(?P<op>\w+) node with name '(?P<node>[^']*)'", re.IGNORECASE),
    re.compile(r"node with name '(?P<node>[^']*)'", re.IGNORECASE),
)
# Where in its source OpenVINO stands.
_SOURCE = re.compile(
    r"(?:Exception from )?\S*src/\S+\.(?:cpp|hpp|h):\d+:?|Check '[^']{0,300}' failed at|FrontEnd API failed with"
)
_OUT_OF_MEMORY = ("bad_alloc", "out of memory", "Cannot allocate memory", "Failed to allocate", "could not allocate")


def library() -> Any:
    """The module `openvino`, which then never opens a connection nor writes below the home folder."""
    for name in _KEPT_OUT:
        cast("dict[str, Any]", sys.modules).setdefault(name, None)  # None: importing it raises ImportError
    import openvino

    return openvino


def clean_message(error: BaseException) -> str:
    """OpenVINO's message in one line, without places in its source and without paths of this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = _SOURCE.sub(" ", text)
    text = re.sub(r"(?<![\w:])/(?:[\w.+-]+/)+", "", text)
    return " ".join(text.split()).lstrip(": ")[:800]


def unsupported_ops(message: str) -> list[str]:
    """Op types that the message of a failed conversion names, without domain and version."""
    found: list[str] = []
    for pattern in (_UNKNOWN_OPS, _FAILED_OPS):
        for match in pattern.finditer(message):
            names = re.split(r"[,\s]+", match.group(1).split(" Summary")[0])
            found += [re.sub(r"-\d+$", "", name).rsplit(".", 1)[-1] for name in names if name and name != "--"]
    return list(dict.fromkeys(found))


def node_of(message: str, graph: ModelProto | None) -> str | None:
    """The ONNX node that a message is about, where it names one."""
    for pattern in _NODE_PATTERNS:
        if match := pattern.search(message):
            groups = match.groupdict()
            if groups.get("node"):
                return groups["node"]
            if graph is not None:
                return next((node_label(n) for n in all_nodes(graph) if groups["output"] in n.output), None)
    return None


def runtime_failure(
    code: str, error: BaseException, *, graph: ModelProto | None = None, remedy: str | None = None
) -> StageFailure:
    """The typed failure for what OpenVINO raised; `graph`: the ONNX model that was read, to name its nodes.

    `code` is the general one; `unsupported_op` and `out_of_memory` (never cached) are told apart by the message.
    """
    message = clean_message(error)
    if isinstance(error, MemoryError) or any(sign in message for sign in _OUT_OF_MEMORY):
        return StageFailure(
            "out_of_memory",
            f"OpenVINO had not enough memory: {message}",
            remedy="Use smaller shapes or batch sizes, or a worker with more memory.",
            cacheable=False,
        )
    if ops := unsupported_ops(message):
        return StageFailure(
            "unsupported_op",
            f"OpenVINO cannot convert op {', '.join(ops)}: {message}",
            node=_first_node(ops, graph) or node_of(message, graph),
            remedy="Use another backend for this model, or export it with other operators.",
        )
    remedy = remedy or "Check that the model runs in OpenVINO on its own, or use another backend for it."
    return StageFailure(code, message, node=node_of(message, graph), remedy=remedy)


def _first_node(ops: Iterable[str], graph: ModelProto | None) -> str | None:
    if graph is None:
        return None
    wanted = set(ops)
    return next((node_label(n) for n in all_nodes(graph) if n.op_type in wanted), None)


def read_model(source: Path | bytes, *, graph: ModelProto | None = None) -> Any:
    """An `openvino.Model` from a file (ONNX or IR) or from a serialized ONNX model without external data.

    Raises StageFailure: `load_failed`, `unsupported_op`, `out_of_memory`.
    """
    ov = library()
    if isinstance(source, Path) and not source.is_file():
        raise StageFailure("load_failed", f"The engine has no file {source.name}.")
    try:
        return ov.Core().read_model(source if isinstance(source, bytes) else str(source))
    except Exception as error:  # the binding raises RuntimeError and classes of its own
        raise runtime_failure("load_failed", error, graph=graph) from error


def fuse_common(model: Any, *, graph: ModelProto | None = None) -> None:
    """What OpenVINO's own conversion tool does to a model that it read ("MOC", in place): constants folded, activations
    recognized, biases and scales merged. The CPU plugin fuses only what it knows in that form: a depthwise convolution
    whose weights NNCF quantized before it stays in floating point. Raises like `read_model`."""
    from openvino._offline_transformations import apply_moc_transformations

    try:
        apply_moc_transformations(model, cf=False, smart_reshape=True)
    except Exception as error:  # as in `read_model`
        raise runtime_failure("load_failed", error, graph=graph) from error


def compile_model(model: Any, config: Mapping[str, Any], *, graph: ModelProto | None = None) -> Any:
    """The model compiled for the CPU; raises like `read_model`."""
    ov = library()
    try:
        return ov.Core().compile_model(model, "CPU", dict(config))
    except Exception as error:  # as in `read_model`
        raise runtime_failure("load_failed", error, graph=graph) from error
