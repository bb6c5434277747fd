"""Will TensorRT take this model? Asked of the real parser, and of the builder where that needs no GPU."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.backends.tensorrt import admits, messages
from workers.backends.tensorrt import build as building
from workers.backends.tensorrt.graph import GraphFacts, read_graph
from workers.backends.tensorrt.library import Library
from workers.backends.tensorrt.options import BuildOptions
from workers.backends.tensorrt.probe import Gpu, probe_gpu
from workers.backends.tensorrt.progress import Progress
from workers.examined import Examined, Refused
from workers.graph.onnx_files import MODEL_FILE, read_skeleton
from workers.graph.onnx_graph import all_nodes
from workers.kernel import Reporter

# RTX 40, L4 and L40S: the least that has all of its precisions.
TARGET = "8.9"
_EXPORT_AGAIN = "Export the model again, and check it with onnx.checker."
_BUILD_SHARE = 0.5  # of the time, at most, for the graph as it is; the rest is for its precisions


def possible(library: Library) -> bool:
    """Whether it can be asked here; makes no object of it."""
    return library.installed() and (not library.needs_gpu or isinstance(probe_gpu(), Gpu))


def examine(library: Library, model: Path, scratch: Path, reporter: Reporter, seconds: float) -> Examined:
    """Every node that the parser refuses. What it takes is built for compute capability 8.9, where no GPU is needed for
    that: not loaded, not run, and kept nowhere; and so is the graph in each precision that its operators admit
    (`admits`). `scratch`: an empty folder. Raises StageFailure of kind INFRASTRUCTURE only."""
    until = time.monotonic() + seconds
    versions = {library.name: library.version()}
    try:
        nodes = [*all_nodes(read_skeleton(model / MODEL_FILE))]
    except Exception as error:  # protobuf's DecodeError, which has no published types
        damaged = Refused("invalid_model", f"{MODEL_FILE} is no ONNX file: {error}", remedy=_EXPORT_AGAIN)
        return Examined(False, "read", [damaged], (), (), versions)
    precisions, refused, facts = admits.by_operators(library, {n.op_type for n in nodes}), [], None
    reporter.progress(0.05, f"{library.title}: reading the graph")
    try:
        facts = read_graph(model)
    except StageFailure as failure:
        refused.append(replace(_refused(failure), op=next((n.op_type for n in nodes if n.name == failure.node), None)))
    gpu = Gpu.elsewhere(TARGET) if not library.needs_gpu else _gpu()
    state = building.start(library, gpu, BuildOptions())
    errors = building.parse(state, model)
    ops = {n.name: n.op_type for n in nodes if n.name}
    refused += [_of_parser(error, ops) for error in errors if error["node"] not in {r.node for r in refused}]
    how = f"parsed by {library.title} {state.version}"
    notes = _notes(facts)
    if refused or facts is None:
        return Examined(False, how, refused, precisions, notes, versions)
    accepted: bool | None = True
    if not library.needs_gpu:
        how = f"{how}, and built for compute capability {TARGET}, on no GPU"
        try:
            accepted = _builds(state, model, facts, Progress(reporter, _BUILD_SHARE * seconds))
        except StageFailure as failure:
            accepted, refused = False, [_refused(failure)]
    del state
    if accepted is None:
        notes.append(f"The build did not end within {_BUILD_SHARE * seconds:.0f} s.")
    elif accepted:
        here = gpu if library.needs_gpu else None
        precisions = admits.asked(library, here, model, precisions, scratch, reporter, until)
    return Examined(accepted, how, refused, precisions, notes, versions)


def _builds(state: building.Building, model: Path, facts: GraphFacts, progress: Progress) -> bool | None:
    """None where the time was over before it was built."""
    try:
        building.make_plan(state, model, facts, None, progress)
    except StageFailure as failure:
        if failure.code == building.CANCELLED:
            return None
        raise
    return True


def _gpu() -> Gpu:
    found = probe_gpu()
    assert isinstance(found, Gpu), "it is possible here"
    return found


def _refused(failure: StageFailure) -> Refused:
    if failure.kind is FailureKind.INFRASTRUCTURE:
        raise failure
    return Refused.of(failure)


def _of_parser(error: Mapping[str, Any], ops: Mapping[str, str]) -> Refused:
    """With the remedy of the failure that the same error would end a build with."""
    failure = messages.parse_failure([dict(error)], messages.Log())
    op = error["op"] or ops.get(str(error["node"]))
    return replace(Refused.of(failure), op=op, node=error["node"], reason=str(error["reason"]))


def _notes(facts: GraphFacts | None) -> list[str]:
    if facts is None or not (facts.declared or facts.float64_tensors):
        return []
    return ["TensorRT computes float64 in float32; inputs and outputs keep the model's type."]
