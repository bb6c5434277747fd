"""Modules of PyTorch, exported by torch.export (`.pt2`) or on to ONNX."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from anneal_client.errors import ConversionFailed
from anneal_client.exporting.checks import hold_against, need, run_onnx
from anneal_client.prepared import ExportedModel

BATCH = "batch"


def from_torch(
    module: Any,
    example_inputs: Any,
    dynamic_shapes: Any = BATCH,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    name: str | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    tolerance: float | None = None,
) -> ExportedModel:
    """Export `module`, in evaluation mode, and hold the export against it.

    `example_inputs`: one tensor, a tuple of those that `forward` takes, or a mapping by its parameters.
    `dynamic_shapes`: "batch" (the first axis, of all tensors whose first axis is as long as the first tensor's), what
    `torch.export.export` takes, also with names for dimensions ({"x": {0: "batch", 1: "time"}}; how far they may go
    torch finds out), or None: the example's sizes and no others. `format`: "onnx" runs on every worker,
    "pt2" needs one with torch. `tolerance`: how far an output may be off, over its largest number. The names of inputs
    are those of `forward`'s parameters.

    Needs the extra `torch`. Raises `ConversionFailed`: `export_failed`, with what torch says; `export_differs`.
    """
    torch = need("torch", "torch")
    if format == "onnx":
        need("onnxscript", "torch")
    elif format != "pt2":
        raise ValueError(f"format is {format!r}; it is 'onnx' or 'pt2'")
    trials = [_bound(module, example_inputs)]
    if isinstance(dynamic_shapes, str):
        if dynamic_shapes != BATCH:
            raise ValueError(f"dynamic_shapes is {dynamic_shapes!r}; as a string it is 'batch'")
        trials, dynamic_shapes = _batches(torch, trials[0])
    exported = ExportedModel(f"{name or type(module).__name__.lower()}.{format}")
    with _evaluating(torch, module):
        answers = [_computed(torch, module, trial, len(trials)) for trial in trials]
        again = _computed(torch, module, trials[0], len(trials))
        try:
            with _quiet():
                unnamed = _unnamed(torch, dynamic_shapes)
                program = torch.export.export(module, (), trials[0], dynamic_shapes=unnamed)
                if format == "pt2":
                    torch.export.save(program, exported.path)
                else:
                    torch.onnx.export(
                        program,
                        f=exported.path,
                        input_names=input_names,
                        output_names=output_names or _names(torch, answers[0], input_names or list(trials[0])),
                        opset_version=opset,
                        dynamic_shapes=dynamic_shapes,  # for the names of its axes
                        verbose=False,
                    )
        except Exception as refused:  # torch raises whatever it comes upon
            raise _refused(refused, len(trials)) from refused
    wanted = [_outputs(torch, answer) for answer in answers]
    if not all(_same(torch, a, b) for a, b in zip(wanted[0], _outputs(torch, again), strict=True)):
        exported.note = "not compared: the module gives something else each time"
        return exported
    for trial, outputs in zip(trials, wanted, strict=True):
        hold_against(exported, [_numpy(o) for o in outputs], _run(torch, exported.path, trial), tolerance)
    return exported


def _batches(torch: Any, example: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The example at two batch sizes, and the shapes that `torch.export.export` takes for any. Not at a size of 1,
    which it takes for a constant."""
    leaves = torch.utils._pytree.tree_leaves(example)
    given = next((int(v.shape[0]) for v in leaves if isinstance(v, torch.Tensor) and v.ndim), None)
    if given is None:
        raise ConversionFailed("no_batch", "No input has an axis.", remedy="Say dynamic_shapes=None.")
    first = max(2, given)
    trials = [_rows(torch, example, given, size) for size in (first, 3 if first != 3 else 4)]
    batch = torch.export.Dim(BATCH)
    return trials, _over_tensors(torch, trials[0], lambda t: {0: batch} if _has(t, first) else None)


def _computed(torch: Any, module: Any, inputs: Mapping[str, Any], sizes: int) -> Any:
    """What the module returns. Raises `ConversionFailed` where it does not take the inputs."""
    try:
        return module(**inputs)
    except Exception as refused:  # whatever the module raises
        shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in inputs.items() if isinstance(v, torch.Tensor))
        remedy = "Give an example that the module takes."
        if sizes > 1:
            remedy += " If it is for one batch size, say dynamic_shapes=None."
        detail = f"The module does not take {shapes}: {type(refused).__name__}: {str(refused)[:500]}"
        raise ConversionFailed("module_fails", detail, remedy=remedy) from refused


def _run(torch: Any, path: Path, inputs: Mapping[str, Any]) -> list[Any] | None:
    """The outputs of what was exported, in order."""
    if path.suffix == ".pt2":
        with _quiet(), torch.no_grad():
            return [_numpy(o) for o in _outputs(torch, torch.export.load(path).module()(**inputs))]
    onnx = need("onnx", "torch")
    names = [i.name for i in onnx.load(path, load_external_data=False).graph.input]
    tensors = [_numpy(t) for t in torch.utils._pytree.tree_leaves(dict(inputs)) if isinstance(t, torch.Tensor)]
    outputs = run_onnx(path, dict(zip(names, tensors, strict=True)))
    return None if outputs is None else list(outputs.values())


def _bound(module: Any, given: Any) -> dict[str, Any]:
    """The example by `forward`'s parameters. Raises `ConversionFailed`."""
    signature = inspect.signature(module.forward)
    if isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    else:
        args, kwargs = (tuple(given) if isinstance(given, tuple | list) else (given,)), {}
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as wrong:
        raise ConversionFailed(
            "wrong_inputs", f"forward{signature} does not take the example: {wrong}.", remedy="Give what forward takes."
        ) from wrong
    found: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_KEYWORD:
                found |= value
            case inspect.Parameter.VAR_POSITIONAL | inspect.Parameter.POSITIONAL_ONLY:
                raise ConversionFailed(
                    "unnamed_inputs",
                    f"forward{signature} takes {name!r} by its place only, so the input has no name.",
                    remedy="Wrap the module in one whose forward names its parameters.",
                )
            case _:
                found[name] = value
    return found


def _over_tensors(torch: Any, inputs: Mapping[str, Any], function: Any) -> dict[str, Any]:
    """The inputs with `function` of each tensor in its place, and None for what is no tensor."""
    return {
        name: torch.utils._pytree.tree_map(lambda v: function(v) if isinstance(v, torch.Tensor) else None, value)
        for name, value in inputs.items()
    }


def _has(tensor: Any, size: int) -> bool:
    return bool(tensor.ndim and tensor.shape[0] == size)


def _rows(torch: Any, inputs: Mapping[str, Any], batch: int, wanted: int) -> dict[str, Any]:
    """The inputs with so many rows: those there are, from the last one on, again and again."""
    if batch == wanted:
        return dict(inputs)

    def filled(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not _has(value, batch):
            return value
        return value[[(batch - 1 - row) % batch for row in range(wanted)]]

    return {name: torch.utils._pytree.tree_map(filled, value) for name, value in inputs.items()}


def _outputs(torch: Any, value: Any) -> list[Any]:
    """The tensors of what a module returned, as they are exported: in the order of its tuples, lists and dicts."""
    return [leaf.detach() for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _unnamed(torch: Any, shapes: Any) -> Any:
    """The shapes with what torch takes in the place of names."""
    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, Mapping):
        return {key: _unnamed(torch, value) for key, value in shapes.items()}
    return type(shapes)(_unnamed(torch, s) for s in shapes) if isinstance(shapes, tuple | list) else shapes


def _names(torch: Any, answer: Any, taken: Sequence[str]) -> list[str] | None:
    """The outputs' names where the module gives a mapping; None where it gives none. An input's name is `taken`."""
    if not isinstance(answer, Mapping):
        return None
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(answer)
    names = [
        "_".join(str(getattr(step, "key", getattr(step, "idx", step))) for step in path)
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    ]
    return [f"{name}_out" if name in taken else name for name in names]


def _same(torch: Any, a: Any, b: Any) -> bool:
    if a.is_floating_point():
        return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True))
    return bool(torch.equal(a, b))


def _numpy(tensor: Any) -> Any:
    """As ONNX Runtime takes and gives it; bfloat16, which numpy has not, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


@contextlib.contextmanager
def _evaluating(torch: Any, module: Any) -> Iterator[None]:
    """Evaluation mode and no gradients; each part is put back as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of itself: of its own deprecations, of libraries that it could use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _refused(error: Exception, sizes: int) -> ConversionFailed:
    remedy = "See what torch says; `torch.export.export(module, ...)` alone gives the same, with its whole trace."
    if sizes > 1:
        remedy = (
            "If the module is for one batch size, say dynamic_shapes=None; if other axes vary, name them: "
            "dynamic_shapes={'x': {0: torch.export.Dim('batch'), 1: torch.export.Dim('time')}}. " + remedy
        )
    return ConversionFailed("export_failed", f"{type(error).__name__}: {str(error).strip()[:2000]}", remedy=remedy)
