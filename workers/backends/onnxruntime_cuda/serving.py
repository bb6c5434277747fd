"""An engine of ONNX Runtime's CUDA provider in Triton: its `onnxruntime` backend on a GPU, whose parameters are those
of that project's README."""

from __future__ import annotations

from collections.abc import Sequence

from workers.backends.onnxruntime_cuda.session import RuntimeOptions
from workers.serving.native import InTriton

_LEVELS = {"basic": -1, "extended": 1, "disable": 2}  # its default is all
_ITS_OWN = ("device_id", "enable_cuda_graph")  # the instance group says the device; it binds no fixed addresses


def in_triton(files: Sequence[str], options: RuntimeOptions) -> InTriton:
    """`files`: of the engine."""
    if options.session_config:
        return InTriton(
            why="Triton's ONNX Runtime backend has no parameter for session_config, with which it was measured"
        )
    told = [(k, v) for k, v in sorted(options.provider_options().items()) if k not in _ITS_OWN]
    provider = {"name": "cuda", "parameters": [{"key": key, "value": value} for key, value in told]}
    level = _LEVELS.get(options.graph_optimization_level or "")
    optimization = {
        **({"graph": {"level": level}} if level is not None else {}),
        **({"execution_accelerators": {"gpu_execution_accelerator": [provider]}} if told else {}),
    }
    return InTriton(
        backend="onnxruntime",
        files={name: name for name in files},
        config={"optimization": optimization},
        notes=("Triton's ONNX Runtime backend captures no CUDA graph.",) if options.cuda_graph else (),
    )
