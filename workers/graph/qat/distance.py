"""How far a program's outputs are from what they shall be: the original's, and the labels where there are some. Needs
torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from app.domain.failures import model_failure
from app.domain.spec import Metric
from workers.graph.qat.placement import not_trainable
from workers.measure.accuracy import Kind, are_probabilities, class_axis, output_kind

_CLASSES: frozenset[Metric] = frozenset({"top1", "top5", "macro_f1", "mean_iou", "agreement", "kl"})
_VECTORS: frozenset[Metric] = frozenset({"cosine", "spearman", "neighbours"})
_NUMBERS: frozenset[Metric] = frozenset({"normalized_error", "psnr", "mae", "rmse", "r2"})
_LEAST = 1e-12


@dataclass(frozen=True)
class Output:
    """One output, and how two of it are compared: KL divergence of classes, cosine of vectors, error of numbers over
    their size; both of the last where it is not clear which of the first and the last fits. `axis`: of the classes."""

    name: str
    kind: Kind
    axis: int
    probabilities: bool

    def distance(self, wanted: Tensor, found: Tensor) -> Tensor:
        """0 where they are the same."""
        error = (wanted - found).square().sum() / wanted.square().sum().clamp(min=_LEAST)
        if self.kind is Kind.NUMBERS:
            return error
        if self.kind is Kind.EMBEDDING:
            return (1 - functional.cosine_similarity(wanted, found, dim=-1)).mean() + error
        a, b = self._logarithms(wanted), self._logarithms(found)
        divergence: Tensor = (a.exp() * (a - b)).sum(self.axis).mean()
        return divergence if self.kind is Kind.LOGITS else divergence + error

    def agreement(self, wanted: Tensor, found: Tensor) -> Tensor:
        """[rows]: 1 where they are the same. Of classes, whether the same one is the best; of vectors their cosine; of
        numbers 1 less the error over the size."""
        if self.kind in (Kind.LOGITS, Kind.UNCLEAR):
            same = (wanted.argmax(self.axis) == found.argmax(self.axis)).float()
            return same.reshape(len(same), -1).mean(1)
        if self.kind is Kind.EMBEDDING:
            cosine = functional.cosine_similarity(wanted, found, dim=-1)
            return cosine.reshape(len(cosine), -1).mean(1)
        a, b = wanted.reshape(len(wanted), -1), found.reshape(len(found), -1)
        error: Tensor = (a - b).norm(dim=1) / a.norm(dim=1).clamp(min=_LEAST)
        return 1 - error

    def _logarithms(self, values: Tensor) -> Tensor:
        return values.clamp(min=_LEAST).log() if self.probabilities else functional.log_softmax(values, self.axis)

    def of_labels(self, labels: Any, found: Tensor) -> Tensor:
        """Cross-entropy with class numbers, an array."""
        scores = self._logarithms(found).movedim(self.axis, 1)
        truth = torch.from_numpy(labels.astype("int64")).to(found.device)
        return functional.nll_loss(scores, truth.reshape(scores.shape[:1] + scores.shape[2:]))

    def has(self, labels: Any, found: Tensor) -> bool:
        """Whether `labels`, an array, are class numbers of what was `found`, one for each."""
        classes = found.shape[self.axis]
        fit = labels.dtype.kind in "iu" and labels.size * classes == found.numel()
        return bool(fit and (not labels.size or 0 <= labels.min() <= labels.max() < classes))


def outputs_of(names: Sequence[str], values: Sequence[Any], metric: Metric) -> list[Output]:
    """By position, of one batch of the original's `values`; those that have no gradient (whole numbers) are left out.
    `metric`: what the job judges by says what is unclear of an output."""
    found = []
    for name, value in zip(names, values, strict=True):
        array = value.detach().cpu().numpy() if value.dtype in (torch.float32, torch.float64) else np.zeros(0, int)
        kind = output_kind(name, array)
        if kind is Kind.EXACT or not array.ndim:
            continue
        if kind is Kind.UNCLEAR:
            known = {Kind.LOGITS: _CLASSES, Kind.EMBEDDING: _VECTORS, Kind.NUMBERS: _NUMBERS}
            kind = next((k for k, metrics in known.items() if metric in metrics), kind)
        classes = kind in (Kind.LOGITS, Kind.UNCLEAR)
        axis = class_axis(array) if classes and array.ndim > 2 else -1
        moved = np.moveaxis(array, axis, -1) if classes else array
        found.append(Output(name, kind, axis % array.ndim, classes and are_probabilities(moved)))
    if not found:
        raise not_trainable("no output holds floating-point numbers, so that none has a gradient", None)
    return found


def labelled(outputs: Sequence[Output], shapes: Mapping[str, Sequence[int]], labels: Any) -> Output | None:
    """The output whose classes the `labels` (one batch, as stored) number; None where they are no class numbers. Raises
    StageFailure `training_labels_mismatch`."""
    if labels.dtype.kind not in "iu":
        return None
    scores = [o for o in outputs if o.kind in (Kind.LOGITS, Kind.UNCLEAR)]
    for output in scores:
        shape = shapes[output.name]
        rest = [size for at, size in enumerate(shape) if at != output.axis]
        if labels.size == int(np.prod(rest)):
            return output
    told = {o.name: list(shapes[o.name]) for o in scores} or "no output that holds scores of classes"
    raise model_failure(
        "training_labels_mismatch",
        f"The training data's labels {list(labels.shape)} do not fit {told}.",
        tensor="labels",
        remedy="Give one class number for each sample (or position), or train without labels.",
    )


def check_labels(output: Output, classes: int, labels: Any) -> None:
    """Raises StageFailure `training_labels_mismatch`."""
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or high >= classes:
        raise model_failure(
            "training_labels_mismatch",
            f"The training data's labels go from {low} to {high}, and output {output.name!r} has {classes} classes.",
            tensor="labels",
            remedy=f"Number the classes from 0 to {classes - 1}, or train without labels.",
        )
