"""The `infer.py` that goes into the bundle of a TensorRT engine: PyCUDA and TensorRT only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends.bundle_script import COMMON
from workers.backends.tensorrt.library import TENSORRT, Library

_TEMPLATE = '''#!/usr/bin/env python3
"""Run the TensorRT engine beside this file on the arrays of an .npz.

    python infer.py [INPUT.npz] [OUTPUT.npz]

INPUT.npz holds one array per model input (default: sample_input.npz beside this file). The outputs are written to
OUTPUT.npz (default: output.npz in the current folder). Without an INPUT, the outputs are also compared with
expected_output.npz, where that stands beside this file; the exit code is 1 where they differ by more than rounding.

An engine is native code for the GPU and the TensorRT version in engine.json. Load only what you got from your own
Anneal service.

Needs: an NVIDIA GPU with its driver, numpy, __LIBRARY__ (__VERSION__ was measured), pycuda; ml_dtypes for bfloat16.
"""

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pycuda.autoprimaryctx  # TensorRT uses the primary context too
import pycuda.driver as cuda
import __MODULE__ as trt

HERE = Path(__file__).resolve().parent
PRIMARY = pycuda.autoprimaryctx.context

# How this engine was measured. `declared`: where the model's type differs from the engine's.
RUNTIME = json.loads(r"""__RUNTIME__""")
COMPILES_WHEN_LOADED = __COMPILES__  # for the GPU that is here, of the compute capability that it was built for
DECLARED = RUNTIME.get("declared", {})


class OutputAllocator(trt.IOutputAllocator):
    """Memory for outputs whose shape depends on the data."""

    def __init__(self, on_host):
        trt.IOutputAllocator.__init__(self)
        self.memory, self.sizes, self.shapes, self.on_host = {}, {}, {}, on_host

    def reallocate_output(self, tensor_name, memory, size, alignment):
        if size > self.sizes.get(tensor_name, -1):
            room = max(size, 1)
            on_host = tensor_name in self.on_host
            self.memory[tensor_name] = np.empty(room, np.uint8) if on_host else cuda.mem_alloc(room)
            self.sizes[tensor_name] = size
        found = self.memory[tensor_name]
        return found.ctypes.data if tensor_name in self.on_host else int(found)

    def reallocate_output_async(self, tensor_name, memory, size, alignment, stream):
        return self.reallocate_output(tensor_name, memory, size, alignment)

    def notify_shape(self, tensor_name, shape):
        self.shapes[tensor_name] = tuple(shape)


def check(ok, what):
    if not ok:
        raise SystemExit(f"TensorRT refused to {what}")


def read_engine(logger):
    """The plan, after its digest and what it was built for were compared with what is here."""
    facts = json.loads((HERE / "engine.json").read_text())
    plan = (HERE / "engine.plan").read_bytes()
    if hashlib.sha256(plan).hexdigest() != facts["plan_sha256"]:
        raise SystemExit("engine.plan is not the file that engine.json describes: download the bundle again.")
    if trt.__version__ != facts["tensorrt"] and not facts["version_compatible"]:
        raise SystemExit(f"The engine needs TensorRT {facts['tensorrt']}, here is {trt.__version__}.")
    device, built = pycuda.autoprimaryctx.device, facts["gpu"]
    found, level = ".".join(map(str, device.compute_capability())), facts["hardware_compatibility"]
    if COMPILES_WHEN_LOADED:
        level = "same_compute_capability"
    other_model = level == "none" and device.name() != built["name"]
    if other_model or (level != "ampere_plus" and found != built["compute_capability"]):
        raise SystemExit(f"The engine is for {built['name']}, here is {device.name()}.")
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise SystemExit("TensorRT does not load the engine: see its messages above.")
    return runtime, engine


def numpy_dtype(kind):
    if kind in (trt.DataType.BF16, trt.DataType.FP8):
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16 if kind == trt.DataType.BF16 else ml_dtypes.float8_e4m3fn)
    return np.dtype(trt.nptype(kind))


class Engine:
    """One context, which serves one call at a time: threads wait for each other."""

    def __init__(self):
        self.lock = threading.Lock()
        self.logger = trt.Logger(trt.Logger.WARNING)
        trt.init_libnvinfer_plugins(self.logger, "")
        self.runtime, self.engine = read_engine(self.logger)
        self.context = self.engine.create_execution_context()
        check(self.context is not None, "make a context: is there enough memory?")
        self.stream = cuda.Stream()
        self.names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        mode = self.engine.get_tensor_mode
        self.inputs = [n for n in self.names if mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in self.names if mode(n) == trt.TensorIOMode.OUTPUT]
        self.profile = 0
        self.buffers = {}  # on the GPU: by name, kept from call to call

    def buffer(self, name, nbytes):
        if name not in self.buffers or self.buffers[name][1] < nbytes:
            self.buffers[name] = (cuda.mem_alloc(max(nbytes, 1)), nbytes)
        return self.buffers[name][0]

    def choose_profile(self, feeds):
        """The profile that holds these shapes and whose optimum is nearest."""
        free = [n for n in self.inputs if -1 in tuple(self.engine.get_tensor_shape(n))]
        best = None
        for index in range(self.engine.num_optimization_profiles if free else 0):
            away = 0.0
            for name in free:
                low, opt, high = (tuple(s) for s in self.engine.get_tensor_profile_shape(name, index))
                shape = feeds[name].shape
                if len(shape) != len(low) or not all(a <= s <= b for a, s, b in zip(low, shape, high)):
                    break
                away += sum(max(a, b) / max(1, min(a, b)) - 1 for a, b in zip(opt, shape))
            else:
                if best is None or away < best[0]:
                    best = (away, index)
        if free and best is None:
            raise SystemExit(f"The engine was not built for shapes {[feeds[n].shape for n in free]}: see engine.json.")
        if best is not None and best[1] != self.profile:
            check(self.context.set_optimization_profile_async(best[1], self.stream.handle), "switch its profile")
            self.stream.synchronize()
            self.profile = best[1]

    def run(self, feeds):
        """Outputs by name, from inputs by name; many threads may call it."""
        with self.lock:
            PRIMARY.push()  # it is current in the thread that imported this file only
            try:
                return self.run_here(feeds)
            finally:
                PRIMARY.pop()

    def run_here(self, feeds):
        self.choose_profile(feeds)
        kept = []
        for name in self.inputs:
            given, dtype = np.asarray(feeds[name]), numpy_dtype(self.engine.get_tensor_dtype(name))
            if given.dtype.kind == "V":  # an .npz does not know bfloat16
                given = given.view(dtype)
            known = [dtype, np.dtype(DECLARED.get(name, dtype))]
            check(given.dtype in known, f"take {given.dtype} for {name}, which is {known[-1]}")
            array = np.asarray(given, dtype=dtype, order="C")
            check(self.context.set_input_shape(name, array.shape), f"take {array.shape} for {name}")
            if self.engine.get_tensor_location(name) == trt.TensorLocation.HOST:
                address = array.ctypes.data
            else:
                memory = self.buffer(name, array.nbytes)
                cuda.memcpy_htod_async(memory, array, self.stream)
                address = int(memory)
            kept.append(array)
            check(self.context.set_tensor_address(name, address), f"take the memory of {name}")
        lacking = self.context.infer_shapes()
        check(not lacking, f"infer shapes: it lacks {lacking}")
        host = {n for n in self.outputs if self.engine.get_tensor_location(n) == trt.TensorLocation.HOST}
        allocator = OutputAllocator(host)
        placed = {}
        for name in self.outputs:
            dtype, shape = numpy_dtype(self.engine.get_tensor_dtype(name)), tuple(self.context.get_tensor_shape(name))
            if -1 in shape:
                check(self.context.set_output_allocator(name, allocator), f"take an allocator for {name}")
            elif name in host:
                placed[name] = np.empty(shape, dtype)
                check(self.context.set_tensor_address(name, placed[name].ctypes.data), f"take the memory of {name}")
            else:
                placed[name] = self.buffer(name, int(np.prod(shape)) * dtype.itemsize)
                check(self.context.set_tensor_address(name, int(placed[name])), f"take the memory of {name}")
        check(self.context.execute_async_v3(self.stream.handle), "run")
        self.stream.synchronize()
        results = {}
        for name in self.outputs:
            found = placed.get(name)
            if not isinstance(found, np.ndarray):
                shape = allocator.shapes[name] if name in allocator.shapes else self.context.get_tensor_shape(name)
                array = np.empty(tuple(shape), numpy_dtype(self.engine.get_tensor_dtype(name)))
                if array.nbytes and name in host:
                    array.reshape(-1).view(np.uint8)[...] = allocator.memory[name][: array.nbytes]
                elif array.nbytes:
                    cuda.memcpy_dtoh(array, found if found is not None else allocator.memory[name])
                found = array
            results[name] = found.astype(DECLARED[name]) if name in DECLARED else found
        return results


def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call.
    `threads` changes nothing: the work is not done by CPU threads."""
    engine = Engine()
    return engine.inputs, engine.run


def read(path):
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


__CHECK__


def main():
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "sample_input.npz"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("output.npz")
    engine = Engine()
    given = read(source)
    missing = [n for n in engine.inputs if n not in given]
    if missing:
        raise SystemExit(f"{source} has no array {missing[0]!r}; the inputs are {', '.join(engine.inputs)}.")
    feeds = {name: given[name] for name in engine.inputs}
    refuse(feeds, about().get("accepts") or {})
    engine.run(feeds)  # the first call sets things up
    start = time.perf_counter()
    outputs = engine.run(feeds)
    print(f"{1000 * (time.perf_counter() - start):.3f} ms with transfers, one call")
    np.savez(target, **outputs)
    print(f"wrote {target}")
    if len(sys.argv) < 2 and not as_expected(outputs):
        sys.exit(1)


if __name__ == "__main__" and (code := guarded(main)):
    sys.exit(code)
'''


def infer_script(runtime: Mapping[str, Any], version: str, library: Library = TENSORRT) -> str:
    """Source of a standalone script for this engine; `version` is the TensorRT that was measured."""
    told = json.dumps(dict(runtime), indent=4, sort_keys=True).replace('"""', r"\"\"\"")
    named = _TEMPLATE.replace("__MODULE__", library.module).replace("__LIBRARY__", library.distributions[0])
    named = named.replace("__COMPILES__", str(library.compiles_when_loaded))
    return named.replace("__CHECK__", COMMON).replace("__RUNTIME__", told).replace("__VERSION__", version)
