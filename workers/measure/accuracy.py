"""How far an engine's outputs are from the original's, sample by sample; memory is a few numbers per sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from workers.measure.losses import rounded
from workers.measure.pairs import PairComparison

Array = np.ndarray[Any, Any]

MAX_CLASSES = 200_000
_UNIT_NORM = 0.02
_EMBEDDING_WIDTH = 64
_SAME_PROBABILITY = 5e-3  # half precision
_CLASS_NAMES = ("logit", "prob", "score", "softmax", "class")
_EMBEDDING_NAMES = ("embed", "pool", "hidden", "feature")


class Kind(StrEnum):
    """What an output is, and so how two of them are compared."""

    LOGITS = "logits"  # scores or probabilities of classes on the last axis: top-1 agreement and KL divergence
    UNCLEAR = "scores_or_numbers"  # [n, m] floats without evidence for either: the worse of what fits the two
    EMBEDDING = "embedding"  # vectors on the last axis: cosine
    NUMBERS = "numbers"  # any other floats: normalized error
    EXACT = "exact"  # integers, booleans, strings: equal or not


@dataclass(frozen=True)
class Broken:
    """Why an engine's outputs cannot be trusted at all."""

    code: str
    output: str | None
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "output": self.output, "detail": self.detail}


def output_kind(name: str, values: Array) -> Kind:
    """The kind of an output, from its name, dtype, shape and values (one batch of the original's).

    LOGITS only on evidence: a name that says so, or rows that are probabilities. Boxes and forecasts have the shape of
    scores too, and the position of their largest value says nothing of the others.
    """
    if values.dtype.kind not in "f":
        return Kind.EXACT
    lower = name.lower()
    classes = values.shape[-1] if values.ndim >= 2 else 0
    class_like = 2 <= classes <= MAX_CLASSES
    if class_like and names_classes(name):
        return Kind.LOGITS
    if classes > 1 and any(word in lower for word in _EMBEDDING_NAMES):
        return Kind.EMBEDDING
    if values.ndim != 2 or not class_like or classes > 100_000:
        return Kind.NUMBERS
    if are_probabilities(values):
        return Kind.LOGITS
    if classes >= _EMBEDDING_WIDTH:
        norms = np.linalg.norm(values.astype(np.float64), axis=-1)
        if np.all(np.abs(norms - 1) < _UNIT_NORM):
            return Kind.EMBEDDING
    return Kind.UNCLEAR


def class_axis(values: Array) -> int:
    """Where scores of classes stand: behind (`…, classes`), and in maps (four axes and more) on axis 1 as in
    `samples, classes, height, width`, unless only the last three axes read as `height, width, classes`."""
    if values.ndim < 4:
        return -1
    _, second, third, last = values.shape[:3] + values.shape[-1:]
    if values.ndim > 4 or third == last:
        return 1
    return -1 if second == third or second > last else 1


def names_classes(name: str) -> bool:
    """Whether an output's name says that it holds scores of classes."""
    return any(word in name.lower() for word in _CLASS_NAMES)


def same_scores(scores: Array, other: Array) -> bool:
    """Whether `other` says the same as `scores` [n, …, classes]: the number of its largest class, or the same
    probabilities (the one may be the logits or the logarithm of the other)."""
    if other.dtype.kind in "iu":
        return other.size * scores.shape[-1] == scores.size and bool(
            np.array_equal(scores.argmax(axis=-1).ravel(), other.ravel())
        )
    if other.dtype.kind != "f" or other.shape != scores.shape:
        return False
    with np.errstate(invalid="ignore"):  # an original's NaN or Infinity is the same as nothing
        p, q = (x.astype(np.float64) if are_probabilities(x) else np.exp(_log_softmax(x)) for x in (scores, other))
    return bool(np.allclose(p, q, atol=_SAME_PROBABILITY))


def are_probabilities(values: Array) -> bool:
    """Whether the last axis holds numbers in 0…1 that add up to one."""
    v = values.astype(np.float64)
    return bool(v.size and v.min() >= -1e-6 and v.max() <= 1 + 1e-3 and np.allclose(v.sum(axis=-1), 1, atol=1e-2))


def check_outputs(
    original: Mapping[str, Array], engine: Mapping[str, Array], first: int, count: int | None = None
) -> Broken | None:
    """What must never ship: a missing output, another dtype or shape, NaN or Infinity where the original has numbers.

    `first`: index of the batch's first sample, for the message; `count`: how many samples of it are real, where the
    rest only pads the batch.
    """
    for name, a in original.items():
        b = engine.get(name)
        if b is None:
            return Broken("output_missing", name, f"The engine has no output {name!r}.")
        if b.dtype != a.dtype and not (a.dtype.kind in "OSU" and b.dtype.kind in "OSU"):
            return Broken("wrong_dtype", name, f"Output {name!r} is {b.dtype}, the original's is {a.dtype}.")
        if b.shape != a.shape:
            where = f"from sample {first} on"
            return Broken("wrong_shape", name, f"Output {name!r} is {b.shape} {where}, the original's {a.shape}.")
        if a.dtype.kind not in "fc":
            continue
        finite = np.isfinite(a)
        for code, word, test in (("output_nan", "NaN", np.isnan), ("output_inf", "Infinity", np.isinf)):
            bad = np.asarray(test(b) & finite)
            if bad.any():
                row = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1))) if bad.ndim else 0
                row = row if count is None else min(row, count - 1)
                return Broken(code, name, f"Output {name!r} holds {word} for sample {first + row}.")
    return None


def per_row(values: Array, rows: int) -> Array:
    """[rows, …]; an output without the batch on its first axis is one row for the whole batch."""
    return values if values.ndim and values.shape[0] == rows else values[np.newaxis]


@dataclass
class OutputComparison:
    """Accumulates one output over all batches. Per row: agreement, KL, cosine, ‖a−b‖², ‖a‖² and how many numbers.

    `axis`: where the classes stand, for scores; None: see `class_axis`. `pairs`: where the vectors are
    also compared with each other.
    """

    name: str
    kind: Kind
    axis: int | None = None
    pairs: PairComparison | None = None
    max_abs_diff: float = 0.0
    original_not_finite: int = 0
    lowest: float = np.inf  # of the original's numbers
    highest: float = -np.inf
    _columns: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, original: Array, engine: Array, rows: int) -> None:
        """Both of one shape; `rows` samples on the first axis."""
        if self.kind is Kind.EXACT:
            equal = per_row(np.asarray(original == engine), rows)
            self._put("agreement", equal.reshape(len(equal), -1).mean(axis=1) if equal.size else np.ones(len(equal)))
            return
        finite = np.isfinite(original)
        self.original_not_finite += int(original.size - finite.sum())
        if finite.any():
            self.lowest = min(self.lowest, float(original.min(where=finite, initial=np.inf)))
            self.highest = max(self.highest, float(original.max(where=finite, initial=-np.inf)))
        a = per_row(np.where(finite, original, 0).astype(np.float64), rows)
        b = per_row(np.where(finite, engine, 0).astype(np.float64), rows)
        if self.kind is Kind.LOGITS and a.ndim >= 3:
            axis = class_axis(a) if self.axis is None else self.axis
            a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
        difference = np.abs(a - b)
        self.max_abs_diff = max(self.max_abs_diff, float(difference.max(initial=0.0)))
        flat = (len(a), -1) if a.size else (len(a), 0)
        self._put("squared_error", (difference**2).reshape(flat).sum(axis=1))
        self._put("squared_norm", (a**2).reshape(flat).sum(axis=1))
        self._put("numbers", np.full(len(a), a[0].size if len(a) else 0))
        if a.ndim >= 2 and self.kind is not Kind.NUMBERS:
            self._put("cosine", _row_means(_cosine(a, b)))
        else:
            self._put("cosine", _cosine(a.reshape(flat), b.reshape(flat)))
        if self.kind in (Kind.LOGITS, Kind.UNCLEAR):
            self._put("agreement", _row_means(a.argmax(axis=-1) == b.argmax(axis=-1)))
            self._put("kl", _row_means(_kl(a, b)))
        if self.pairs is not None and a.ndim >= 2 and a.size and len(a) == rows:
            self.pairs.add(a, b)

    def column(self, name: str) -> Array:
        """One value per row."""
        parts = self._columns.get(name)
        return np.concatenate(parts) if parts else np.zeros(0)

    def to_json(self) -> dict[str, Any]:
        """Figures over all rows; only those that fit the kind."""
        out: dict[str, Any] = {"kind": str(self.kind)}
        if "agreement" in self._columns:
            out["agreement"] = rounded(float(self.column("agreement").mean()))
        if "kl" in self._columns:
            out["mean_kl"] = rounded(float(self.column("kl").mean()))
        if self.kind is not Kind.EXACT:
            out["cosine"] = rounded(float(self.column("cosine").mean()))
            out["max_abs_diff"] = rounded(self.max_abs_diff)
            out["normalized_error"] = rounded(
                normalized_error(self.column("squared_error").sum(), self.column("squared_norm").sum())
            )
        if self.original_not_finite:
            out["original_not_finite"] = self.original_not_finite
        return out

    def _put(self, name: str, values: Array) -> None:
        self._columns.setdefault(name, []).append(np.asarray(values, dtype=np.float64))


def normalized_error(squared_error: float, squared_norm: float) -> float:
    """‖a − b‖ / ‖a‖; the plain ‖a − b‖ where the original is all zeros."""
    return float(np.sqrt(squared_error / squared_norm)) if squared_norm > 0 else float(np.sqrt(squared_error))


def _row_means(values: Array) -> Array:
    v = np.asarray(values, dtype=np.float64)
    return np.asarray(v.reshape(len(v), -1).mean(axis=1))


def _cosine(a: Array, b: Array) -> Array:
    """Over the last axis. Two zero vectors agree; one zero vector agrees with nothing."""
    na, nb = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = na * nb
    cosine = (a * b).sum(axis=-1) / np.where(product > 0, product, 1)
    return np.asarray(np.where((na == 0) & (nb == 0), 1.0, np.clip(cosine, -1, 1)))


def _kl(a: Array, b: Array) -> Array:
    """KL(original ‖ engine) in nats over the last axis, of probabilities or of the softmax of scores."""
    if are_probabilities(a) and are_probabilities(b):
        log_a, log_b = np.log(np.clip(a, 1e-12, None)), np.log(np.clip(b, 1e-12, None))
    else:
        log_a, log_b = _log_softmax(a), _log_softmax(b)
    return np.asarray(np.maximum((np.exp(log_a) * (log_a - log_b)).sum(axis=-1), 0))


def _log_softmax(x: Array) -> Array:
    x = x.astype(np.float64)
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
