"""Which metric judges an engine: against labels, references, or the original's own outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from app.domain.failures import FailureKind, StageFailure, data_failure
from app.domain.spec import Metric
from workers.data import LABELS
from workers.measure.accuracy import Kind, class_axis
from workers.measure.agreement import DECIDES
from workers.measure.truth import MAX_COUNTED_CLASSES, TOP, labels_mismatch, squeezed

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
Basis = Literal["labels", "references", "agreement"]
Form = Literal["classes", "targets", "scores", "exact"]

CLASS_METRICS: tuple[Metric, ...] = ("top1", "top5", "macro_f1", "mean_iou")
TARGET_METRICS: tuple[Metric, ...] = ("mae", "rmse", "r2")
_NEEDS: dict[Metric, str] = {
    "top1": "needs `labels` in the validation data and an output with a score per class",
    "top5": f"needs `labels` in the validation data and an output with the scores of more than {TOP} classes",
    "macro_f1": f"needs `labels` in the validation data, and an output with the scores of at most {MAX_COUNTED_CLASSES}"
    " classes or of the labels' shape",
    "mean_iou": "needs label maps ([samples, height, width] of class numbers) as `labels` in the validation data, and"
    f" an output with the scores of at most {MAX_COUNTED_CLASSES} classes for each position",
    **dict.fromkeys(TARGET_METRICS, "needs targets of an output's shape in the data, as `labels` or by its name"),
}
_BOTH = "scores of classes or plain numbers, nothing says which: the worse of top-1 and normalized error"


@dataclass(frozen=True)
class Decision:
    """`output` is judged by `metric` on the ground of `basis`. `all_outputs`: every other output is held to the
    original's by its kind, and the worst decides; without it, somebody asked for this one metric. `form`: what the
    truth is (class numbers, numbers of the output's shape, scores of classes, values to be met exactly). `axis`: where
    the classes stand; None where the output holds class numbers."""

    metric: Metric
    basis: Basis
    output: str
    why: str
    all_outputs: bool = False
    form: Form | None = None
    axis: int | None = None
    one_hot: bool = False


def decide(
    metric: Metric, kinds: Mapping[str, Kind], outputs: Arrays, references: Arrays, *, one_hot: bool = False
) -> Decision:
    """From the first batch: the original's outputs (and their kinds) and the data set's references. `one_hot`: each row
    of its labels has a single one among zeros; for scores of the same shape these are class numbers written out.

    Raises StageFailure: `metric_mismatch` (REQUEST) where the metric asked for fits neither outputs nor data;
    `labels_mismatch` and `dataset_dtype_mismatch` (DATA) where labels fit no output that they seem to be for.
    """
    found = _by_one_hot(metric, kinds, outputs, references) if one_hot else None
    found = found or _by_labels(metric, kinds, outputs, references)
    found = found or _by_references(metric, kinds, outputs, references)
    if found is not None:
        return found
    if metric == "auto":
        return _by_agreement(kinds, labels_unused=LABELS in references)
    if metric in _NEEDS:
        raise _mismatch(metric, _NEEDS[metric])
    floats = [n for n, k in kinds.items() if k is not Kind.EXACT]
    if metric in ("normalized_error", "psnr"):
        fitting = floats
    elif metric in ("cosine", "spearman", "neighbours"):
        fitting = sorted((n for n in floats if outputs[n].ndim >= 2), key=lambda n: kinds[n] is not Kind.EMBEDDING)
    else:
        order = (Kind.LOGITS, Kind.UNCLEAR, *((Kind.EXACT,) if metric == "agreement" else ()))
        fitting = [n for kind in order for n, k in kinds.items() if k is kind]
    if not fitting:
        raise _mismatch(metric, f"fits none of the outputs {sorted(outputs)}")
    return Decision(metric, "agreement", fitting[0], f"asked for; against the original's output {fitting[0]!r}")


def _by_one_hot(metric: Metric, kinds: Mapping[str, Kind], outputs: Arrays, references: Arrays) -> Decision | None:
    labels = references[LABELS]
    scores = {n: x for n, x in outputs.items() if x.shape == labels.shape}
    if LABELS in outputs or not scores or metric not in ("auto", *CLASS_METRICS):
        return None
    found = _by_labels(metric, kinds, scores, {LABELS: labels.argmax(axis=-1)})
    if found is None or found.form != "classes":
        return None
    return replace(found, one_hot=True, why=f"{found.why} (one-hot labels: one class in each row)")


def _by_labels(metric: Metric, kinds: Mapping[str, Kind], outputs: Arrays, references: Arrays) -> Decision | None:
    if LABELS not in references or LABELS in outputs:
        return None
    auto, labels = metric == "auto", squeezed(references[LABELS])
    if metric in ("auto", *CLASS_METRICS) and labels.dtype.kind in "biu":
        found = _scores_of(labels, metric, kinds, outputs)
        if found is not None:
            name, axis = found
            told: Metric = metric if not auto else "mean_iou" if labels.ndim >= 3 else "top1"
            where = "" if axis in (None, -1) else f" (along axis {axis})"
            what = f"a score per class{where}" if axis is not None else "class numbers"
            why = f"the data has labels and {name!r} {what}"
            return Decision(told, "labels", name, why, auto, "classes", axis)
    if metric in ("auto", "macro_f1", "normalized_error", *TARGET_METRICS):
        same = [n for n, x in outputs.items() if x.dtype.kind == "f" and squeezed(x).shape == labels.shape]
        if same and labels.size:
            told = "r2" if auto else metric
            why = f"the labels have the shape of {same[0]!r}"
            return Decision(told, "labels", same[0], why, auto, "targets")
    _check_labels(metric, labels, kinds, outputs)
    return None


def _scores_of(
    labels: Array, metric: Metric, kinds: Mapping[str, Kind], outputs: Arrays
) -> tuple[str, int | None] | None:
    """The output whose classes the labels number, and the axis of the classes."""
    fitting: list[tuple[str, int | None]] = []
    for name, x in outputs.items():
        if metric == "auto" and kinds[name] is Kind.EMBEDDING:
            continue  # the largest number of a vector is no class
        if x.dtype.kind == "f" and x.ndim >= 2:
            axes = [a for a in (-1, 1) if x.shape[a] >= 2 and _without(x.shape, a) == labels.shape]
            if axes:
                fitting.append((name, axes[0] if len(axes) == 1 else class_axis(x)))
        elif x.dtype.kind in "iu" and squeezed(x).shape == labels.shape:
            fitting.append((name, None))
    if metric == "top5":
        fitting = [(n, a) for n, a in fitting if a is not None and outputs[n].shape[a] > TOP]
    elif metric in ("macro_f1", "mean_iou"):
        fitting = [(n, a) for n, a in fitting if a is None or outputs[n].shape[a] <= MAX_COUNTED_CLASSES]
    if metric == "mean_iou" and labels.ndim < 3:
        return None
    order = (Kind.LOGITS, Kind.UNCLEAR, Kind.NUMBERS, Kind.EMBEDDING, Kind.EXACT)
    most = int(labels.max(initial=0)) + 1
    return min(
        fitting,
        key=lambda f: (order.index(kinds[f[0]]), f[1] is not None and outputs[f[0]].shape[f[1]] < most),
        default=None,
    )


def _check_labels(metric: Metric, labels: Array, kinds: Mapping[str, Kind], outputs: Arrays) -> None:
    """Labels that fit no output are refused where an output looks as if they were meant for it."""
    if metric in TARGET_METRICS:
        shapes = {n: list(x.shape) for n, x in outputs.items()}
        raise labels_mismatch(
            f"Labels of shape {list(labels.shape)} per batch fit none of the outputs {shapes}.",
            "Give targets of the output's shape.",
        )
    if metric not in ("auto", *CLASS_METRICS):
        return
    meant = [n for n, k in kinds.items() if k in (Kind.LOGITS, Kind.UNCLEAR)]
    if labels.ndim >= 3:
        meant += [n for n, x in outputs.items() if x.dtype.kind == "f" and x.ndim == labels.ndim + 1 and n not in meant]
    if not meant:
        return
    name, shape = meant[0], list(outputs[meant[0]].shape)
    fits = any(_without(tuple(shape), axis) == labels.shape for axis in (-1, 1))
    if labels.dtype.kind == "f":
        raise data_failure(
            "dataset_dtype_mismatch",
            f"The labels are {labels.dtype}, and the output {name!r}, {shape} per batch, takes class numbers.",
            tensor=LABELS,
            remedy="Save class numbers: labels=labels.astype(np.int64); or targets of the output's shape.",
        )
    if not fits:
        raise labels_mismatch(
            f"Labels of shape {list(labels.shape)} do not fit the scores {name!r}, {shape} per batch.",
            "Give one class number per sample, or for label maps one per position of the output.",
        )


def _by_references(metric: Metric, kinds: Mapping[str, Kind], outputs: Arrays, references: Arrays) -> Decision | None:
    auto = metric == "auto"
    by_name = [n for n, r in references.items() if n in outputs and outputs[n].shape == r.shape]
    order = [Kind.LOGITS, Kind.UNCLEAR, *(k for k in Kind if k not in (Kind.LOGITS, Kind.UNCLEAR))]
    by_name.sort(key=lambda n: order.index(kinds[n]))
    if metric in ("normalized_error", *TARGET_METRICS):
        floats = [n for n in by_name if kinds[n] is not Kind.EXACT]
        if floats:
            why = f"asked for; against the references of {floats[0]!r}"
            return Decision(metric, "references", floats[0], why, form="targets")
        return None
    if metric not in ("auto", "top1") or not by_name:
        return None
    name = by_name[0]
    kind = kinds[name]
    if kind is Kind.LOGITS or (kind is Kind.UNCLEAR and not auto):
        why = f"the data has references for the scores {name!r}"
        return Decision("top1", "references", name, why, auto, "scores", -1)
    if not auto:
        return None
    chosen: Metric = "agreement" if kind is Kind.EXACT else "normalized_error"
    form: Form = "exact" if kind is Kind.EXACT else "scores" if kind is Kind.UNCLEAR else "targets"
    why = f"the data has references for {name!r}" + (f" ({_BOTH})" if kind is Kind.UNCLEAR else "")
    return Decision(chosen, "references", name, why, True, form, -1)


def _by_agreement(kinds: Mapping[str, Kind], *, labels_unused: bool) -> Decision:
    for kind in (Kind.LOGITS, Kind.UNCLEAR, Kind.EMBEDDING, Kind.NUMBERS, Kind.EXACT):
        for name, found in kinds.items():
            if found is kind:
                why = "the labels fit no output" if labels_unused else "no labels or references"
                what = _BOTH if kind is Kind.UNCLEAR else str(kind)
                why += f": agreement with the original, each output by its kind ({name!r}: {what}); the worst decides"
                return Decision(DECIDES[kind][0], "agreement", name, why, all_outputs=True)
    raise StageFailure("no_outputs", "The model has no outputs that are tensors.")


def _mismatch(metric: str, why: str) -> StageFailure:
    return StageFailure(
        "metric_mismatch",
        f"The metric {metric!r} {why}.",
        FailureKind.REQUEST,
        remedy="Use the metric 'auto', or one that fits the model's outputs and the data.",
    )


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """A shape without that axis."""
    return shape[:-1] if axis == -1 else shape[:axis] + shape[axis + 1 :]
