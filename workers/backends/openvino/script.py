"""How the bundle's `infer.py` loads an OpenVINO engine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends import bundle_script

_IMPORTS = """
# OpenVINO reports its use over the network through this package while it is imported; without it, it does not.
sys.modules.setdefault("openvino_telemetry", None)
import threading

import openvino as ov"""

_LOADER = '''
# The properties this engine was compiled and measured with.
PROPERTIES = json.loads(r"""__PROPERTIES__""")


def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call.
    `threads`: that compute, where it is not as many as were measured."""
    properties = dict(PROPERTIES)
    if threads is not None:  # unpinned: every instance would be pinned to the same first cores
        properties.update(NUM_STREAMS=1, INFERENCE_NUM_THREADS=threads, ENABLE_CPU_PINNING=False)
    compiled = ov.Core().compile_model(str(HERE / "model.xml"), "CPU", properties)
    idle, making = [], threading.Lock()  # requests: each serves one call at a time
    # Tensors go by position; the names are the original model's.
    interface = json.loads((HERE / "interface.json").read_text(encoding="utf-8"))
    inputs = [item["name"] for item in interface["inputs"]]
    outputs = [item["name"] for item in interface["outputs"]]

    def run(feeds):
        try:
            request = idle.pop()
        except IndexError:
            with making:
                request = compiled.create_infer_request()
        tensors = [ov.Tensor(np.asarray(feeds[name], order="C")) for name in inputs]
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, tensor)
        request.infer(share_outputs=True)
        found = {name: np.array(request.get_output_tensor(i).data) for i, name in enumerate(outputs)}
        idle.append(request)  # its outputs were copied; one whose call failed is not used again
        return found

    return inputs, run
'''


def infer_script(properties: Mapping[str, Any], version: str) -> str:
    """Source of `infer.py` for an engine that is compiled with these properties. `version`: OpenVINO's."""
    text = json.dumps(dict(properties), indent=2, sort_keys=True, ensure_ascii=True)
    return bundle_script.infer_script(
        library="openvino",
        version=version,
        imports=_IMPORTS,
        loader=_LOADER.replace("__PROPERTIES__", text),
    )
