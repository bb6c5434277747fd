"""Whether the metric that a job asks for can be formed of the model's outputs and the validation data, as far as their
names, types and shapes tell. What only values tell (classes out of range, equal targets), the job finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.domain.spec import Metric
from app.errors import AppError, FieldError, invalid_request

LABELS = "labels"
_CLASSES: tuple[Metric, ...] = ("top1", "top5", "macro_f1", "mean_iou")
_TARGETS: tuple[Metric, ...] = ("mae", "rmse", "r2")
_TOP = 5
_REMEDY = "Use the metric 'auto', or one that fits the model's outputs and the data (docs/measurement.md)."

Tensor = Mapping[str, Any]
Shape = Sequence[int | str]


def check_metric(metric: Metric, pointer: str, arrays: Sequence[Tensor] | None, outputs: Sequence[Tensor]) -> None:
    """Raise 422 where the metric fits neither. `arrays`: of the validation data that `pointer` names, None without any;
    their shapes are those of a sample. `outputs`: of the model, none where they are not known yet."""
    by_name = {a["name"]: a for a in arrays or ()}
    references = [o["name"] for o in outputs if o["name"] in by_name and o["name"] != LABELS]
    labels = by_name.get(LABELS)
    if metric in (*_CLASSES, *_TARGETS):
        what = "targets (`labels`, or an array named by the output)" if metric in _TARGETS else "`labels`"
        enough = labels is not None or (bool(references) and metric in ("top1", *_TARGETS))
        if not enough and (outputs or arrays is None):
            raise _refused(f"the metric {metric!r} needs validation data with {what}")
    known = [o for o in outputs if o["shape"] is not None]
    if not outputs or len(known) < len(outputs):
        return
    if labels is not None and not references and metric in ("auto", *_CLASSES, *_TARGETS):
        _check_labels(metric, pointer, labels, known)
    floats = [o for o in known if _is_float(o)]
    if metric in ("normalized_error", "psnr") and not floats:
        raise _refused(f"the metric {metric!r} needs an output of floats")
    if metric in ("cosine", "spearman", "neighbours", "kl") and not any(len(o["shape"]) >= 2 for o in floats):
        raise _refused(f"the metric {metric!r} needs an output of floats with an axis behind the samples")


def _check_labels(metric: Metric, pointer: str, labels: Tensor, outputs: Sequence[Tensor]) -> None:
    shape = _squeezed(labels["shape"])
    shown = f"labels of type {labels['dtype']} and shape {['samples', *labels['shape']]}"
    scored = [axis for o in outputs for axis in _class_sizes(o, shape)]
    same = [o for o in outputs if _is_float(o) and _fits(_squeezed(o["shape"][1:]), shape) and o["shape"]]
    if _is_float(labels):
        if scored and not same and metric in ("auto", *_CLASSES):
            raise _refused(f"{shown} are no class numbers", pointer, "Save them as labels.astype(numpy.int64).")
        if metric in ("top1", "top5", "mean_iou"):
            raise _refused(f"the metric {metric!r} takes class numbers, and there are {shown}", pointer)
    if metric == "mean_iou" and len(shape) < 2:
        raise _refused(f"the metric 'mean_iou' needs label maps, and there are {shown}", pointer)
    if metric == "top5" and scored and all(isinstance(size, int) and size <= _TOP for size in scored):
        raise _refused(f"the metric 'top5' needs more than {_TOP} classes")
    maps = len(shape) >= 2 and any(_is_float(o) and len(o["shape"]) == len(shape) + 2 for o in outputs)
    if metric == "auto" and maps and not scored and not same:
        raise _refused(f"{shown} fit no output as label maps", pointer, "Give them the height and width of the output.")
    fits = bool(same) if metric in _TARGETS else bool(scored) or (metric == "macro_f1" and bool(same))
    if metric != "auto" and not fits:
        wanted = {o["name"]: o["shape"] for o in outputs}
        raise _refused(f"the metric {metric!r} cannot compare {shown} with any of the outputs {wanted}", pointer)


def _class_sizes(output: Tensor, labels: Shape) -> list[int | str]:
    """How many classes an output may have for labels of that shape; 0 where it holds class numbers itself."""
    if not output["shape"]:
        return []
    shape = list(output["shape"][1:])
    if not _is_float(output):
        return [0] if output["dtype"] != "string" and _fits(_squeezed(shape), labels) else []
    return [shape[a] for a in {-1, 0} if shape and shape[a] != 1 and _fits(shape[:a] + shape[a:][1:], labels)]


def _squeezed(shape: Shape) -> list[int | str]:
    """A sample's shape without the axis that holds one number or one channel."""
    return list(shape[1:]) if len(shape) in (1, 3, 4) and shape[0] == 1 else list(shape)


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        isinstance(a, str) or isinstance(b, str) or a == b for a, b in zip(shape, wanted, strict=True)
    )


def _is_float(tensor: Tensor) -> bool:
    return str(tensor["dtype"]).startswith(("float", "bfloat", "double", "half"))


def _refused(message: str, pointer: str = "/validation/metric", remedy: str = _REMEDY) -> AppError:
    return invalid_request(f"The accuracy cannot be judged so: {message}.", [FieldError(pointer, message)], remedy)
