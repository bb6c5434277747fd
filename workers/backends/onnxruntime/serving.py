"""An ONNX Runtime engine in Triton: its `onnxruntime` backend, whose parameters are those of that project's README."""

from __future__ import annotations

from collections.abc import Sequence

from workers.backends.onnxruntime.session import RuntimeOptions
from workers.serving.native import InTriton

_LEVELS = {"basic": -1, "extended": 1, "disable": 2}  # its default is all


def in_triton(files: Sequence[str], options: RuntimeOptions) -> InTriton:
    """`files`: of the engine."""
    if options.session_config or options.denormal_as_zero:
        what = "session_config" if options.session_config else "denormal_as_zero"
        return InTriton(why=f"Triton's ONNX Runtime backend has no parameter for {what}, with which it was measured")
    told = {
        "intra_op_thread_count": options.intra_op_num_threads,
        "inter_op_thread_count": options.inter_op_num_threads,
        "execution_mode": None if options.execution_mode is None else int(options.execution_mode == "parallel"),
        "enable_mem_arena": None if options.enable_cpu_mem_arena is None else int(options.enable_cpu_mem_arena),
        "enable_mem_pattern": None if options.enable_mem_pattern is None else int(options.enable_mem_pattern),
    }
    level = _LEVELS.get(options.graph_optimization_level or "")
    spins = options.allow_spinning is False
    return InTriton(
        backend="onnxruntime",
        files={name: name for name in files},
        parameters={key: str(value) for key, value in told.items() if value is not None},
        config={"optimization": {"graph": {"level": level}}} if level is not None else {},
        notes=("Idle threads spin there, which the measured engine's do not: no parameter says so.",) if spins else (),
    )
