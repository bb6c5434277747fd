"""What TensorRT made of a graph, from the engine inspector's JSON: the layers of the plan and what was fused in them.

The inspector wrote `Bindings` in TensorRT 10 and writes `I/O Tensors` in 11; layers are objects in a DETAILED plan, and
plain names otherwise.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workers.backends.tensorrt.library import Library

if TYPE_CHECKING:
    import tensorrt

MOST_LAYERS = 2000
_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_SEPARATORS = re.compile(r"\s*(?:\+|,|\x1e|\x1f|\|\|)\s*")
_PATTERNS = {
    "attention": re.compile(r"mha|attention|flash|softmax.*matmul|fmha", re.IGNORECASE),
    "gelu": re.compile(r"gelu|erf", re.IGNORECASE),
    "layer_norm": re.compile(r"layer_?norm|normalization|reducemean", re.IGNORECASE),
    "conv": re.compile(r"conv", re.IGNORECASE),
    "batch_norm": re.compile(r"(?:^|[/_.])bn|batch_?norm", re.IGNORECASE),
    "relu": re.compile(r"relu|clip", re.IGNORECASE),
    "matmul": re.compile(r"gemm|matmul|matrix|(?:^|[/_.])fc", re.IGNORECASE),
    "add": re.compile(r"add|residual", re.IGNORECASE),
}


def inspection_of(library: Library, engine: tensorrt.ICudaEngine) -> str:
    """The engine inspector's JSON; empty where it gives none."""
    trt = library.load()
    inspector = engine.create_engine_inspector()
    return inspector.get_engine_information(trt.LayerInformationFormat.JSON) if inspector is not None else ""


def weights_bytes(library: Library, engine: tensorrt.ICudaEngine) -> int | None:
    """What the engine's weights take; None where this TensorRT (early versions of 10) does not tell."""
    trt = library.load()
    if not hasattr(trt, "EngineStat"):
        return None
    return int(engine.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE))


def profile_layers(library: Library, context: tensorrt.IExecutionContext) -> dict[str, float]:
    """Have every enqueue of `context` from now on add its layers' milliseconds to what is returned, by layer name.
    Such an enqueue waits for the GPU."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.load()
    times: dict[str, float] = {}

    class Times(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    context.profiler = Times()
    return times


def read_inspection(text: str, op_of: Mapping[str, str]) -> dict[str, Any]:
    """`{"layers": [{name, type, precision, tactic, origins, fused}], "fused": {kind: count}, "layer_count",
    "io_tensors"}`; `op_of`: op type by ONNX node name. An answer that is no JSON gives no layers and says so."""
    try:
        found = json.loads(text)
    except ValueError:
        return {"layers": [], "layer_count": 0, "fused": {}, "io_tensors": [], "reason": "the inspector gave no JSON"}
    raw = found.get("Layers", []) if isinstance(found, dict) else []
    layers = [_layer(entry, op_of) for entry in raw]
    fused = Counter(kind for layer in layers for kind in layer["fused"])
    answer: dict[str, Any] = {
        "layers": layers[:MOST_LAYERS],
        "layer_count": len(layers),
        "fused": dict(sorted(fused.items())),
        "io_tensors": _io_names(found if isinstance(found, dict) else {}),
    }
    if len(layers) > MOST_LAYERS:
        answer["reason"] = f"the first {MOST_LAYERS} of {len(layers)} layers"
    return answer


def _layer(entry: Any, op_of: Mapping[str, str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        entry = {"Name": str(entry)}
    name = str(entry.get("Name", ""))
    origins = _origins(name, str(entry.get("Metadata") or ""))
    kinds = fusions(
        name, str(entry.get("ParameterType") or entry.get("LayerType") or ""), [op_of.get(o, o) for o in origins]
    )
    tactic = entry.get("TacticName") or entry.get("TacticValue")
    return {
        "name": name[:500],
        "type": str(entry.get("LayerType") or "") or None,
        "precision": _precision(entry),
        "tactic": str(tactic)[:200] if tactic else None,
        "origins": origins[:64],
        "fused": kinds,
    }


def _origins(name: str, metadata: str) -> list[str]:
    """The ONNX nodes that went into a layer: from its metadata, else from the parts of its name."""
    found = _ORIGIN.findall(metadata)
    if not found:
        inner = re.sub(r"^\{?ForeignNode\[|\]\}?$", "", name)
        found = [part for part in _SEPARATORS.split(inner) if part]
    return list(dict.fromkeys(part.strip() for part in found))


def fusions(name: str, layer_type: str, ops: list[str]) -> list[str]:
    """Which of the well-known fusions a layer is: conv+bn+relu and its parts, attention, gelu, layer_norm, gemm+…

    Exact where the inspector tells the ONNX nodes; from names otherwise. One layer is one of a kind.
    """
    text = " ".join([name, layer_type, *ops])
    has = {kind: bool(pattern.search(text)) for kind, pattern in _PATTERNS.items()}
    kinds = []
    if has["attention"] and (len(ops) > 1 or "mha" in text.lower() or "attention" in layer_type.lower()):
        kinds.append("attention")
    if has["gelu"]:
        kinds.append("gelu")
    if has["layer_norm"] and not has["conv"]:
        kinds.append("layer_norm")
    parts = [label for label, kind in (("bn", "batch_norm"), ("add", "add"), ("relu", "relu")) if has[kind]]
    if has["conv"] and parts:
        kinds.append("+".join(["conv", *parts]))
    elif has["matmul"] and not kinds and len(ops) > 1 and [p for p in parts if p != "bn"]:
        kinds.append("+".join(["gemm", *(p for p in parts if p != "bn")]))
    return kinds


def _precision(entry: Mapping[str, Any]) -> str | None:
    """The format of the layer's first output, e.g. `Half`, as the inspector spells it."""
    outputs = entry.get("Outputs")
    if isinstance(outputs, list) and outputs and isinstance(outputs[0], Mapping):
        text = str(outputs[0].get("Format/Datatype") or outputs[0].get("Datatype") or "")
        return text[:100] or None
    return None


def _io_names(found: Mapping[str, Any]) -> list[str]:
    raw = found.get("I/O Tensors", found.get("Bindings", []))
    if not isinstance(raw, list):
        return []
    return [str(entry.get("Name", "") if isinstance(entry, Mapping) else entry) for entry in raw]
