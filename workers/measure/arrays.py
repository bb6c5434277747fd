"""Whether the arrays of a data set fit a model: type, shape, finite numbers; a typed error for each that does not."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.domain.failures import data_failure
from workers.kernel import TensorSpec
from workers.measure.axes import sample_shape
from workers.measure.npz import Member
from workers.measure.synthetic import DTYPE_ALIASES

Array = np.ndarray[Any, Any]

LABELS = "labels"


def check_input(label: str, spec: TensorSpec, wanted: np.dtype[Any], member: Member, axis: int | None = 0) -> None:
    """`axis`: of the batch in the model's input; `member` has its samples first."""
    if member.dtype.newbyteorder("=") != wanted:
        raise data_failure(
            "dataset_dtype_mismatch",
            f"Array {spec.name!r} of {label} is {member.dtype}, the model's input is {wanted}.",
            tensor=spec.name,
            remedy=f"Save it as array.astype(np.{wanted}), if that loses nothing that matters.",
        )
    check_shape(label, spec, member, axis)


def check_shape(label: str, spec: TensorSpec, member: Member, axis: int | None = 0) -> None:
    if not spec.shape and axis is not None:
        raise data_failure(
            "dataset_shape_mismatch",
            f"The model's {spec.name!r} is a scalar without a batch axis: it cannot hold samples.",
            tensor=spec.name,
            remedy="Export the model with a batch axis on every input.",
        )
    sample = sample_shape(spec, axis)
    fits = len(member.shape) == len(sample) + 1 and all(
        not isinstance(dim, int) or dim <= 0 or dim == have for dim, have in zip(sample, member.shape[1:], strict=True)
    )
    if not fits:
        names = [*map(str, spec.shape)]
        if axis is not None:
            names[axis] = "samples"
        raise data_failure(
            "dataset_shape_mismatch",
            f"Array {spec.name!r} of {label} has shape {list(member.stored)}, the model's is [{', '.join(names)}].",
            tensor=spec.name,
            remedy="Save it with the first axis for the samples and the model's own shape after it."
            if axis == 0
            else f"Save it in the model's own layout, or say otherwise: inputs.{spec.name}.batch_axis of the job.",
        )


def check_reference(label: str, spec: TensorSpec, member: Member) -> None:
    try:
        kind = np.dtype(DTYPE_ALIASES.get(spec.dtype, spec.dtype)).kind
    except TypeError:
        kind = "f"  # e.g. bfloat16, which numpy does not know: references for it are ordinary floats
    if member.dtype.kind != kind and not {member.dtype.kind, kind} <= set("iu"):
        raise data_failure(
            "dataset_dtype_mismatch",
            f"Reference {spec.name!r} of {label} is {member.dtype}, the model's output is {spec.dtype}.",
            tensor=spec.name,
            remedy="Save what the output should be, or class numbers under the name `labels`.",
        )
    check_shape(label, spec, member)


def check_labels(label: str, member: Member) -> None:
    """Class numbers, zeros and ones, or targets; which of them an output takes is seen when it is judged."""
    if member.dtype.kind not in "iubf":
        raise data_failure(
            "dataset_dtype_mismatch",
            f"The labels of {label} are {member.dtype}, not numbers.",
            tensor=LABELS,
            remedy="Save class numbers: labels=labels.astype(np.int64); or targets as floats.",
        )
    if not member.shape:
        raise data_failure(
            "dataset_shape_mismatch",
            f"The labels of {label} are a single number.",
            tensor=LABELS,
            remedy="Save one label per sample.",
        )


def check_finite(name: str, array: Array, first: int, label: str) -> None:
    if array.dtype.kind not in "fc" or not array.size:
        return
    finite = np.isfinite(array)
    if not finite.all():
        index = int(np.argmin(finite.reshape(len(array), -1).all(axis=1)))
        raise data_failure(
            "dataset_not_finite",
            f"Sample {first + index} of array {name!r} ({label}) holds NaN or Infinity.",
            tensor=name,
            remedy="Remove or repair the sample.",
        )


def keyword(name: str) -> str:
    return name if name.isidentifier() else f"**{{{name!r}: array}}  # instead of {name!r}"


def is_one_hot(labels: Array | None) -> bool:
    """Whether labels [n, classes] hold a single one among zeros in every row: class numbers, written out."""
    if labels is None or labels.ndim != 2 or labels.shape[1] < 2 or labels.dtype.kind not in "biuf":
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels.sum(axis=1) == 1).all())
