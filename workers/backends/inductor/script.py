"""How the bundle's `infer.py` loads an engine that Inductor compiled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from workers.backends import bundle_script

_COMMON = '''
# How this engine was loaded when it was measured.
RUNTIME = json.loads(r"""__RUNTIME__""")
DEVICE = "__DEVICE__"
ENGINE = json.loads((HERE / "engine.json").read_text(encoding="utf-8"))
INTERFACE = json.loads((HERE / "interface.json").read_text(encoding="utf-8"))


def checked(feeds):
    """Compiled code reads what it was compiled for and checks nothing: raise for other types and sizes."""
    sizes = {}
    for spec in INTERFACE["inputs"]:
        name, array = spec["name"], np.asarray(feeds[spec["name"]])
        if str(array.dtype) != spec["dtype"] or array.ndim != len(spec["shape"]):
            given, wanted = f"{array.dtype} {list(array.shape)}", f"{spec['dtype']} {spec['shape']}"
            raise ValueError(f"input {name} is {given}, the model's is {wanted}")
        for axis, (size, dim, (least, most)) in enumerate(zip(array.shape, spec["shape"], ENGINE["ranges"][name])):
            inside = (least is None or size >= least) and (most is None or size <= most)
            if not inside or (isinstance(dim, str) and sizes.setdefault(dim, size) != size):
                raise ValueError(f"input {name} has size {size} on axis {axis}; the engine does not take it")


def fitting():
    """Compiled code ends a process on a processor that lacks one of its instructions: say so before."""
    wanted, cpuinfo = set(ENGINE["target"].get("instructions", ())), Path("/proc/cpuinfo")
    if wanted and cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        there = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
        if wanted - there:
            sys.exit(f"this processor lacks {', '.join(sorted(wanted - there))}, for which the engine was compiled")
    if ENGINE["target"]["torch"] != torch.__version__:
        print(f"compiled with torch {ENGINE['target']['torch']}, loaded with {torch.__version__}", file=sys.stderr)


def tensors_of(feeds):
    arrays = [np.asarray(feeds[name], order="C") for name in ENGINE["order"]]
    return [torch.from_numpy(a if a.flags.writeable else a.copy()) for a in arrays]


def unpacked(found):
    """Arrays by name; those in memory of the engine's own are copied."""
    names = [item["name"] for item in INTERFACE["outputs"]]
    arrays = {name: tensor.numpy() for name, tensor in zip(names, found)}
    return {name: array.copy() if name in ENGINE["fixed"] else array for name, array in arrays.items()}
'''

_PACKAGE = """
def make_runner():
    # What torch._inductor.aoti_load_package wraps, without the seconds that importing it takes; one thread at a time.
    return torch._C._aoti.AOTIModelPackageLoader(str(HERE / "model.pt2"), "model", True, 1, -1).run
"""

_CACHE = '''
def make_runner():
    """The program, compiled again: Inductor finds the kernels in its cache. Each shape's first call takes seconds."""
    import torch._inductor
    import torch.export

    torch.compiler.load_cache_artifacts((HERE / "cache.bin").read_bytes())
    program = torch.export.load(str(HERE / "program.pt2"))
    compiled = torch.compile(program.module(), fullgraph=True)
    pytree = torch.utils._pytree
    user, in_spec = program.graph_signature.user_inputs, program.call_spec.in_spec
    sizes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in user if isinstance(sizes.get(name), torch.Tensor)]
    free = [[axis for axis, size in enumerate(sizes[name].shape) if not isinstance(size, int)] for name in names]

    def runner(tensors):
        for tensor, axes in zip(tensors, free):
            for axis in axes:
                if tensor.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
        given = dict(zip(names, tensors))
        args, kwargs = pytree.tree_unflatten([given.get(name, name) for name in user], in_spec)
        found = pytree.tree_leaves(compiled(*args, **kwargs))
        return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]

    return runner
'''

_CPU = '''
def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call.
    `threads`: that compute, where it is not as many as were measured."""
    fitting()
    if threads or RUNTIME.get("threads"):
        torch.set_num_threads(threads or RUNTIME["threads"])
    runner, alone = make_runner(), threading.Lock()

    def run(feeds):
        checked(feeds)
        tensors = tensors_of(feeds)
        with alone, torch.no_grad():
            return unpacked(runner(tensors))

    return [item["name"] for item in INTERFACE["inputs"]], run
'''

_CUDA = '''
def load(threads=None):
    """Names of the inputs, and a function from arrays by name to outputs by name, which many threads may call.
    `threads` changes nothing: the work is not done by CPU threads."""
    fitting()
    torch.backends.cudnn.allow_tf32 = ENGINE["precision"] != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False
    runner, alone, captured = make_runner(), threading.Lock(), {}

    def capture(tensors):
        inputs = [t.cuda() for t in tensors]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                runner(list(inputs))
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = runner(list(inputs))
        return inputs, graph, outputs

    def compute(tensors):
        if not RUNTIME.get("cuda_graph"):
            return runner([t.cuda(non_blocking=True) for t in tensors])
        key = tuple((t.dtype, tuple(t.shape)) for t in tensors)
        if key not in captured:
            while len(captured) >= 16:  # each holds the memory of its activations
                captured.pop(next(iter(captured)))
            captured[key] = capture(tensors)
        inputs, graph, outputs = captured[key]
        for place, tensor in zip(inputs, tensors):
            place.copy_(tensor, non_blocking=True)
        graph.replay()
        return outputs

    def run(feeds):
        checked(feeds)
        tensors = tensors_of(feeds)
        with alone, torch.no_grad():
            return unpacked([t.cpu() for t in compute(tensors)])

    return [item["name"] for item in INTERFACE["inputs"]], run
'''


def infer_script(runtime: Mapping[str, Any], device: str, version: str) -> str:
    """Source of `infer.py` for an engine that is loaded with `runtime`. `version`: torch's, for the reader."""
    text = json.dumps(dict(runtime), indent=2, sort_keys=True, ensure_ascii=True)
    making = _CACHE if runtime.get("form") == "cache" else _PACKAGE
    parts = (_COMMON.replace("__RUNTIME__", text), making, _CUDA if device == "cuda" else _CPU)
    return bundle_script.infer_script(
        library="torch",
        version=version,
        imports="import threading\n\nimport torch",
        loader="\n\n".join(part.strip("\n") + "\n" for part in parts).replace("__DEVICE__", device),
    )
