"""An OpenVINO engine in Triton: its `openvino` backend, whose parameters are those of that project's README, where that
computes what was measured.

It compiles the model once for all instances of a process, and cannot be told to compute in float32 on a processor with
bf16 instructions, where OpenVINO takes bf16 by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from workers.candidates import BF16_FLAGS
from workers.graph.interface import INTERFACE_FILE, Interface
from workers.graph.ir import files as ir
from workers.serving.native import Instances, InTriton

if TYPE_CHECKING:
    from workers.backends.openvino import RuntimeOptions

_NARROW = frozenset({"i8", "u8", "i4", "u4", "nf4", "f8e4m3", "f8e5m2"})  # types of compressed weights


def in_triton(instances: Instances, options: RuntimeOptions) -> InTriton:
    """`options`: of one instance."""
    model, interface = ir.read_ir(instances.engine)
    why = _unsaid(options, instances.hardware) or _names(model, interface) or _rounds_activations(model)
    if why:
        return InTriton(why=why)
    streams, threads, count = options.num_streams, options.inference_num_threads, max(instances.count, 1)
    told = {
        "PERFORMANCE_HINT": options.performance_hint.upper(),
        "HINT_BF16": "YES" if options.inference_precision == "bf16" else None,
        # One compiled model serves all instances: each has a stream of its own, and its threads.
        "NUM_STREAMS": str(count * (streams or 1)) if streams or count > 1 else None,
        "INFERENCE_NUM_THREADS": str(count * threads) if threads else None,
    }
    return InTriton(
        backend="openvino",
        files={path.name: path.name for path in sorted(instances.engine.iterdir()) if path.name != INTERFACE_FILE},
        parameters={key: value for key, value in told.items() if value is not None},
    )


def _unsaid(options: RuntimeOptions, hardware: Mapping[str, Any]) -> str | None:
    """What of the measured properties no parameter says, where that changes the answers."""
    if options.inference_precision == "f32" and BF16_FLAGS & set(hardware.get("isa") or ()):
        return (
            "Triton's OpenVINO backend would compute in bf16 on this processor, and cannot be told not to; the engine "
            "was measured in float32"
        )
    if options.snippets is False:
        return "Triton's OpenVINO backend cannot switch off the fused kernels that answer wrongly in this model"
    return None


def _names(model: Any, interface: Interface) -> str | None:
    """Triton goes by names, which OpenVINO may have lost."""
    for spec, port in (
        *zip(interface.inputs, model.inputs, strict=True),
        *zip(interface.outputs, model.outputs, strict=True),
    ):
        if spec.name not in port.get_names() or port.get_any_name() != spec.name:
            return f"the engine's own files do not hold the name {spec.name!r}, by which Triton would ask"
    return None


def _rounds_activations(model: Any) -> str | None:
    """Beside compressed weights OpenVINO rounds activations to 8 bits on the fly; the measured engine does not."""
    kinds = {node.get_type_name() for node in model.get_ops()}
    narrow = any(
        node.get_type_name() == "Constant" and node.get_element_type().get_type_name() in _NARROW
        for node in model.get_ops()
    )
    if narrow and "FakeQuantize" not in kinds:
        return "Triton's OpenVINO backend would round activations to 8 bits beside the compressed weights"
    return None
