"""Raising the opset, with a numeric comparison before the new model is believed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, version_converter

from app.domain.failures import StageFailure
from workers.graph.onnx_graph import external_tensors, opset_of
from workers.stages.export._trial import TrialInputs, batch_sizes, compare, open_session
from workers.stages.export._write import write_model


def raise_opset(
    model: ModelProto, minimum: int, workspace: Path, trial: TrialInputs, shapes: Mapping[str, Any] | None
) -> tuple[ModelProto, list[str]]:
    """The model at opset `minimum` or above, and notes. Where the converter cannot, or its result computes something
    else, the model stays as it is and a note says why."""
    before = opset_of(model)
    if before >= minimum:
        return model, []
    reason = None
    if external_tensors(model):
        reason = "its weights are too many for the converter"
    elif model.functions:
        reason = "it has local functions"
    if reason is None:
        converted, reason = _convert(model, minimum)
        if converted is not None:
            reason = _difference(model, converted, workspace, trial, shapes)
            if reason is None:
                return converted, [f"Opset raised from {before} to {opset_of(converted)}."]
    return model, [f"Opset kept at {before}: {reason}."]


def _convert(model: ModelProto, minimum: int) -> tuple[ModelProto | None, str | None]:
    try:
        converted = version_converter.convert_version(model, minimum)
        onnx.checker.check_model(converted)
    except Exception as error:  # ConvertError, RuntimeError, ValidationError: all mean "cannot"
        return None, f"the converter cannot ({' '.join(str(error).split())[:160]})"
    names = [[i.name for i in m.graph.input] + [o.name for o in m.graph.output] for m in (model, converted)]
    if names[0] != names[1]:
        return None, "the converter changes the names of inputs or outputs"
    converted.metadata_props.extend(model.metadata_props)
    return converted, None


def _difference(
    model: ModelProto, converted: ModelProto, workspace: Path, trial: TrialInputs, shapes: Mapping[str, Any] | None
) -> str | None:
    """Why the converted model cannot be believed, or None."""
    folders = [workspace / "opset_before", workspace / "opset_after"]
    for each, folder in zip((model, converted), folders, strict=True):
        write_model(each, folder)
    try:
        new = open_session(folders[1])
    except StageFailure as failure:
        return f"the converted model does not load ({failure.detail[:160]})"
    try:
        old = open_session(folders[0])
    except StageFailure:
        return None  # only the new one runs at all: there is nothing to differ from
    for batch in batch_sizes(old.inputs, shapes):
        feeds = trial.at(old.inputs, batch, 0)
        try:
            wanted = old.run(feeds)
        except StageFailure:
            continue
        try:
            found = compare(wanted, new.run(feeds))
        except StageFailure as failure:
            return f"the converted model does not run ({failure.detail[:160]})"
        if found.significant:
            return f"the converted model differs in output {found.tensor!r} by {found.error:.3g}"
    return None
