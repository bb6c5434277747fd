"""What a job optimizes, as far as the headers of its models tell: one model, or a chain of them seen as one, refused at
submission where they do not fit. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.db.orm import SourceModel
from app.domain.chain import NotJoined, join
from app.domain.spec import OptimizationSpec
from app.errors import FieldError, invalid_request
from app.queue.messages import SPECIAL_FORMATS

_REMEDY = (
    "`connect` names, for inputs of a model, the output of the model before that goes there; their types and sizes are "
    "those that GET /v1/models/{id} tells. Where they differ, export a model again (with a cast or a transpose)."
)


@dataclass(frozen=True)
class Source:
    """`inputs`, `outputs`: none where they are not known yet. `format`: what a worker has to be able to read."""

    inputs: Sequence[dict[str, Any]]
    outputs: Sequence[dict[str, Any]]
    format: str


def pointer_of(place: int, field: str = "model_id") -> str:
    """Of a model of the job's spec, by its place in the chain."""
    return f"/{field}" if place == 0 else f"/chain/then/{place - 1}/{field}"


def source_of(spec: OptimizationSpec, models: Sequence[SourceModel]) -> Source:
    """Raise 422 where the chain's models do not fit each other."""
    first = models[0]
    if spec.chain is None:
        return Source(first.inputs, first.outputs, first.format)
    special = next((m.format for m in models if m.format in SPECIAL_FORMATS), first.format)
    if not all(model.inputs and model.outputs for model in models):
        return Source([], [], special)  # a header that could not be read: the worker finds out
    try:
        whole = join([(m.inputs, m.outputs) for m in models], [link.connect for link in spec.chain.then])
    except NotJoined as error:
        pointer = pointer_of(error.model, "connect")
        if error.input is not None:
            pointer += f"/{error.input}"
        detail = f"Models {error.model} and {error.model + 1} of the chain do not fit: {error}."
        raise invalid_request(detail, [FieldError(pointer[:300], str(error))], _REMEDY) from error
    return Source(whole.inputs, whole.outputs, special)
