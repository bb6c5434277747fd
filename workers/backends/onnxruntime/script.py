"""How the bundle's `infer.py` loads an ONNX Runtime engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends import bundle_script

_LOADER = '''
# The session options this engine was measured with; an empty object means ONNX Runtime's defaults.
RUNTIME = json.loads(r"""__RUNTIME__""")


def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call.
    `threads`: that compute, where it is not as many as were measured."""
    runtime = RUNTIME if threads is None else {**RUNTIME, "intra_op_num_threads": threads}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    levels = {
        "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    }
    if "graph_optimization_level" in runtime:
        options.graph_optimization_level = levels[runtime["graph_optimization_level"]]
    if "intra_op_num_threads" in runtime:
        options.intra_op_num_threads = runtime["intra_op_num_threads"]
    if "inter_op_num_threads" in runtime:
        options.inter_op_num_threads = runtime["inter_op_num_threads"]
    if runtime.get("execution_mode") == "parallel":
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    for name in ("enable_cpu_mem_arena", "enable_mem_pattern"):
        if name in runtime:
            setattr(options, name, runtime[name])
    if "allow_spinning" in runtime:
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if runtime["allow_spinning"] else "0")
    if "denormal_as_zero" in runtime:
        options.add_session_config_entry("session.set_denormal_as_zero", "1" if runtime["denormal_as_zero"] else "0")
    for key, value in runtime.get("session_config", {}).items():
        options.add_session_config_entry(key, value)
    session = ort.InferenceSession(str(HERE / "model.onnx"), options, providers=["CPUExecutionProvider"])
    outputs = [item.name for item in session.get_outputs()]
    return [item.name for item in session.get_inputs()], lambda feeds: dict(zip(outputs, session.run(None, feeds)))
'''


def infer_script(runtime: Mapping[str, Any], version: str) -> str:
    """Source of `infer.py` for an engine with these session options. `version`: ONNX Runtime's, for the reader."""
    text = json.dumps(dict(runtime), indent=2, sort_keys=True, ensure_ascii=True)
    return bundle_script.infer_script(
        library="onnxruntime",
        version=version,
        imports="import onnxruntime as ort",
        loader=_LOADER.replace("__RUNTIME__", text),
    )
