"""Which precisions a graph admits: asked of the real parser with the graph written in each of them, and of the builder
where that needs no GPU. What is not asked is told by the graph's operators, and says so."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import get_args

from app.domain.failures import FailureKind, StageFailure
from workers.backends.tensorrt import build as building
from workers.backends.tensorrt import messages
from workers.backends.tensorrt.graph import NEEDS, least_capability, read_graph
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import BuildOptions
from workers.backends.tensorrt.probe import Gpu, capability
from workers.backends.tensorrt.progress import Progress
from workers.backends.tensorrt.recipes import CONVERTED_OPS
from workers.examined import Precision
from workers.graph.onnx_files import MODEL_FILE, save_model, size_of
from workers.graph.precision.explicit import Recipe, without_data
from workers.kernel import Reporter

RECIPES: tuple[Recipe, ...] = get_args(Recipe)
_PRODUCTS = ("MatMul", "Gemm")
_BY_OPS, _WRITTEN = "by its operators", "written in it"
_LARGEST = 200_000_000  # bytes of a model that is written five times more


def by_operators(library: Library, ops: Collection[str]) -> list[Precision]:
    """Of the graph as it is: a quantized one holds its own."""
    quantized = bool({"QuantizeLinear", "DequantizeLinear"} & {*ops})
    found = [Precision("fp32", True, how=_BY_OPS)]
    for name in RECIPES:
        wanted = _PRODUCTS if name == "int4" else CONVERTED_OPS
        reason = None
        if quantized:
            reason = "the model is quantized already: its own Q/DQ nodes decide"
        elif not {*ops} & {*wanted}:
            reason = f"no operator that {name} speeds up ({', '.join(wanted)})"
        needs = f"compute capability {_least(library, name)} or later"
        found.append(Precision(name, reason is None, reason, needs, _BY_OPS))
    return found


def asked(
    library: Library,
    gpu: Gpu | None,
    model: Path,
    known: list[Precision],
    scratch: Path,
    reporter: Reporter,
    until: float,
) -> list[Precision]:
    """`known`, with what the parser and the builder say of those that are admitted by their operators. `gpu`: this
    machine's, where the library builds for no other; `until`: by `time.monotonic()`, after which nobody is asked.
    Raises StageFailure of kind INFRASTRUCTURE only."""
    found = [replace(known[0], how="as it is")]
    for precision in known[1:]:
        recipe = next(r for r in RECIPES if r == precision.name)
        if not precision.admitted:
            found.append(precision)
        elif size_of(model) > _LARGEST:
            found.append(replace(precision, how=f"{_BY_OPS}: the model is too large to be written in each"))
        elif time.monotonic() >= until:
            found.append(replace(precision, how=f"{_BY_OPS}: the time was over"))
        else:
            at = gpu or Gpu.elsewhere(_least(library, recipe))
            (folder := scratch / recipe).mkdir()
            found.append(_asked(library, at, model, precision, recipe, folder, reporter, until))
    return found


def _asked(
    library: Library,
    gpu: Gpu,
    model: Path,
    known: Precision,
    recipe: Recipe,
    folder: Path,
    reporter: Reporter,
    until: float,
) -> Precision:
    try:
        made = without_data(model / MODEL_FILE, recipe, folder)
    except StageFailure as failure:
        return _refused(known, failure, _WRITTEN)
    except MemoryError:
        raise
    except Exception as error:  # a pass that trips over what the parser took; the graph is anybody's
        reason = f"It cannot be written in {recipe}: {' '.join(str(error).split())[:300]}"
        return replace(known, admitted=False, reason=reason, how=_WRITTEN)
    (written := folder / "written").mkdir()
    save_model(made, written)
    del made
    state = building.start(library, gpu, BuildOptions(precision=recipe))
    errors = building.parse(state, written)
    how = f"parsed by {library.title}, written in it"
    if errors:
        return _refused(known, messages.parse_failure(errors, state.log), how)
    if library.needs_gpu:
        return replace(known, how=how)
    built = f"{how}, and built for compute capability {gpu.compute_capability}, on no GPU"
    left = until - time.monotonic()
    try:
        building.make_plan(state, written, read_graph(written), None, Progress(reporter, left))
    except StageFailure as failure:
        if failure.code == building.CANCELLED:
            return replace(known, how=f"{how}; the build did not end in time")
        return _refused(known, failure, built)
    return replace(known, how=built)


def _refused(known: Precision, failure: StageFailure, how: str) -> Precision:
    if failure.kind is FailureKind.INFRASTRUCTURE:
        raise failure
    where = f"{failure.node}: " if failure.node and failure.node not in failure.detail else ""
    return replace(known, admitted=False, reason=f"{where}{failure.detail}"[:500], how=how)


def _least(library: Library, precision: str) -> str:
    """The least compute capability that has kernels for it, of those that the library builds for."""
    return next((c for c in library.capabilities if capability(c) >= NEEDS[precision]), least_capability(precision))
