"""The other form of an engine: the lowered program, and what Inductor left in its caches while it compiled that. At
load it is compiled again and finds every kernel there; those for a CPU are compiled anew, which takes the compiler."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from workers.artifacts import PROGRAM_FILE
from workers.backends.inductor.library import contained, library
from workers.backends.inductor.options import BuildOptions
from workers.backends.inductor.sidecar import CACHE_FILE
from workers.graph.exported_program import ProgramFolder

_BATCH = 4  # where none is expected: any size above one, for sizes of 0 and 1 have code of their own


def write(graph: Any, source: ProgramFolder, out: Path, options: BuildOptions, device: str) -> None:
    """Compile `graph` for a batch of one and for all others, and keep the caches. Raises what torch raises."""
    from workers.data import synthetic_feeds
    from workers.measure.axes import fixed_batch

    torch = library(compiles=True)
    _save(torch, graph, source, out / PROGRAM_FILE, device)
    torch._dynamo.reset()
    runner = _compiled(torch, out)
    specs = source.interface.inputs
    fixed = fixed_batch(specs)
    for batch in (fixed,) if fixed else (1, source.batch_sizes(options.batch or _BATCH)[1]):
        feeds = synthetic_feeds(specs, batch, options.shapes, 0)
        runner([torch.from_numpy(feeds[name].copy()).to(device) for name in source.order])
    saved = torch.compiler.save_cache_artifacts()
    if saved is None:
        raise RuntimeError("Inductor kept nothing in its caches")
    (out / CACHE_FILE).write_bytes(saved[0])


def load(engine: Path) -> Callable[[list[Any]], Sequence[Any]]:
    """The compiled program of a verified engine. Its caches stay until the process ends: each shape's first call looks
    there. The same steps as in `script`."""
    torch = library(compiles=True)
    held = ExitStack()
    held.enter_context(contained())
    atexit.register(held.close)
    torch.compiler.load_cache_artifacts((engine / CACHE_FILE).read_bytes())
    return _compiled(torch, engine)


def _save(torch: Any, graph: Any, source: ProgramFolder, path: Path, device: str) -> None:
    """`graph` as a program of its own, with the sizes free that were free before."""
    pytree = torch.utils._pytree
    move = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, copy=True), source.program.example_inputs)
    shapes = torch.export.ShapesCollection()
    tensors = [leaf for leaf in pytree.tree_leaves(move) if isinstance(leaf, torch.Tensor)]
    for name, tensor in zip(source.order, tensors, strict=True):
        free = [axis for axis, (low, high) in enumerate(source.ranges[name]) if low is None or low != high]
        if free:
            shapes[tensor] = dict.fromkeys(free, torch.export.Dim.AUTO)
    args, kwargs = move
    torch.export.save(
        torch.export.export(graph, args, kwargs, dynamic_shapes=shapes.dynamic_shapes(graph, args, kwargs)), path
    )


def _compiled(torch: Any, folder: Path) -> Callable[[list[Any]], Sequence[Any]]:
    pytree = torch.utils._pytree
    program = torch.export.load(str(folder / PROGRAM_FILE))
    compiled = torch.compile(program.module(), fullgraph=True)
    user, in_spec = program.graph_signature.user_inputs, program.call_spec.in_spec
    sizes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    names = [name for name in user if isinstance(sizes.get(name), torch.Tensor)]
    free = [[axis for axis, size in enumerate(sizes[name].shape) if not isinstance(size, int)] for name in names]

    def run(tensors: list[Any]) -> Sequence[Any]:
        for tensor, axes in zip(tensors, free, strict=True):
            for axis in axes:
                if tensor.shape[axis] > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, axis)
        given = dict(zip(names, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([given.get(name, name) for name in user], in_spec)
        with torch.no_grad():
            found = pytree.tree_leaves(compiled(*args, **kwargs))
        return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]

    return run
