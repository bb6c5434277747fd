"""Comparing outputs: kinds, distances against known values, and which metric judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.domain.failures import FailureKind, StageFailure
from workers.measure.accuracy import Kind, OutputComparison, check_outputs, output_kind
from workers.measure.judge import Decision, TruthComparison, agreement_result, decide

RNG = np.random.default_rng(0)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def unit(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    x = RNG.standard_normal(shape)
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "values", "kind"),
    [
        ("out", RNG.standard_normal((4, 10)), Kind.LOGITS),
        ("out", softmax(RNG.standard_normal((4, 1000)) * 50), Kind.LOGITS),  # sure of itself: norm near 1
        ("out", unit((4, 384)), Kind.EMBEDDING),
        ("out", RNG.standard_normal((4, 384)), Kind.LOGITS),
        ("sentence_embedding", RNG.standard_normal((4, 384)), Kind.EMBEDDING),
        ("last_hidden_state", RNG.standard_normal((4, 7, 16)), Kind.EMBEDDING),
        ("logits", RNG.standard_normal((4, 7, 500)), Kind.LOGITS),
        ("out", RNG.standard_normal((4, 7, 500)), Kind.NUMBERS),
        ("out", RNG.standard_normal((4, 1)), Kind.NUMBERS),
        ("out", RNG.standard_normal(4), Kind.NUMBERS),
        ("label", np.arange(4), Kind.EXACT),
        ("label", np.array(["a", "b"]), Kind.EXACT),
    ],
)
def test_kind_of_an_output(name: str, values: np.ndarray[Any, Any], kind: Kind) -> None:
    assert output_kind(name, values) is kind


def test_distances_of_logits() -> None:
    a = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0]], np.float32)
    b = np.array([[1.0, 2.0, 0.0], [0.0, 3.0, 1.0]], np.float32)
    comparison = OutputComparison("y", Kind.LOGITS)
    comparison.add(a[:1], b[:1], 1)
    comparison.add(a[1:], b[1:], 1)
    out = comparison.to_json()
    p, q = softmax(a[0]), softmax(b[0])
    assert out["agreement"] == 0.5
    assert out["max_abs_diff"] == 1.0
    assert out["mean_kl"] == pytest.approx(float((p * np.log(p / q)).sum()) / 2, rel=1e-5)
    assert out["normalized_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-5)
    assert out["cosine"] == pytest.approx((4 / 5 + 1) / 2, rel=1e-5)
    assert comparison.column("agreement").tolist() == [0.0, 1.0]


def test_kl_of_probabilities_is_not_softmaxed_again() -> None:
    p, q = np.array([[0.9, 0.1]]), np.array([[0.6, 0.4]])
    comparison = OutputComparison("y", Kind.LOGITS)
    comparison.add(p, q, 1)
    assert comparison.to_json()["mean_kl"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)


def test_zero_vectors_and_outputs_without_a_sample_axis() -> None:
    comparison = OutputComparison("y", Kind.NUMBERS)
    comparison.add(np.zeros(()), np.zeros(()), 5)
    comparison.add(np.zeros(()), np.ones(()), 5)
    assert comparison.column("cosine").tolist() == [1.0, 0.0]
    assert comparison.to_json()["normalized_error"] == 1.0


def test_infinities_of_the_original_are_counted_and_left_out() -> None:
    a = np.array([[1.0, -np.inf], [1.0, 2.0]], np.float32)
    assert check_outputs({"y": a}, {"y": a.copy()}, 0) is None
    comparison = OutputComparison("y", Kind.NUMBERS)
    comparison.add(a, a.copy(), 2)
    assert comparison.to_json()["original_not_finite"] == 1
    assert comparison.to_json()["normalized_error"] == 0


@pytest.mark.parametrize(
    ("engine", "code"),
    [
        ({}, "output_missing"),
        ({"y": np.ones((3, 2))}, "wrong_dtype"),
        ({"y": np.ones((3, 3), np.float32)}, "wrong_shape"),
        ({"y": np.array([[1, 1], [1, np.nan], [1, 1]], np.float32)}, "output_nan"),
        ({"y": np.array([[1, 1], [1, -np.inf], [1, 1]], np.float32)}, "output_inf"),
    ],
)
def test_what_must_never_ship(engine: dict[str, Any], code: str) -> None:
    broken = check_outputs({"y": np.ones((3, 2), np.float32)}, engine, 40)
    assert broken is not None
    assert (broken.code, broken.output) == (code, "y")
    if code in ("output_nan", "output_inf"):
        assert "sample 41" in broken.detail


def decision_for(metric: Any, outputs: dict[str, Any], references: dict[str, Any]) -> Decision:
    return decide(metric, {n: output_kind(n, v) for n, v in outputs.items()}, outputs, references)


LOGITS = {"y": RNG.standard_normal((4, 10))}
HIDDEN = {"hidden": RNG.standard_normal((4, 7, 16))}


@pytest.mark.parametrize(
    ("metric", "outputs", "references", "expected"),
    [
        ("auto", LOGITS, {"labels": np.zeros(4, int)}, ("top1", "labels")),
        ("auto", LOGITS, {"labels": np.zeros((4, 1), int)}, ("top1", "labels")),
        ("auto", {"t": np.zeros((4, 7, 3))}, {"labels": np.zeros((4, 7), int)}, ("top1", "labels")),
        ("top1", LOGITS, {"y": LOGITS["y"]}, ("top1", "references")),
        ("auto", LOGITS, {"y": LOGITS["y"]}, ("top1", "references")),
        ("auto", HIDDEN, {"hidden": HIDDEN["hidden"]}, ("normalized_error", "references")),
        ("auto", HIDDEN, {"labels": np.zeros(4, int)}, ("cosine", "agreement")),
        ("auto", LOGITS, {}, ("agreement", "agreement")),
        ("auto", {"y": np.zeros((4, 3, 8, 8))}, {}, ("normalized_error", "agreement")),
        ("cosine", LOGITS, {}, ("cosine", "agreement")),
        ("normalized_error", LOGITS, {"labels": np.zeros(4, int)}, ("normalized_error", "agreement")),
        ("agreement", LOGITS, {"labels": np.zeros(4, int)}, ("agreement", "agreement")),
    ],
)
def test_which_metric_judges(
    metric: Any, outputs: dict[str, Any], references: dict[str, Any], expected: tuple[str, str]
) -> None:
    decision = decision_for(metric, outputs, references)
    assert (decision.metric, decision.basis) == expected
    assert decision.why


@pytest.mark.parametrize(
    ("metric", "outputs", "references", "code", "kind"),
    [
        ("top1", LOGITS, {}, "metric_mismatch", FailureKind.REQUEST),
        ("top1", HIDDEN, {"labels": np.zeros(4, int)}, "metric_mismatch", FailureKind.REQUEST),
        ("agreement", HIDDEN, {}, "metric_mismatch", FailureKind.REQUEST),
        ("cosine", {"y": np.zeros(4)}, {}, "metric_mismatch", FailureKind.REQUEST),
        ("normalized_error", {"y": np.zeros(4, int)}, {}, "metric_mismatch", FailureKind.REQUEST),
        ("auto", LOGITS, {"labels": np.zeros((4, 3), int)}, "labels_mismatch", FailureKind.DATA),
    ],
)
def test_a_metric_that_does_not_fit(
    metric: Any, outputs: dict[str, Any], references: dict[str, Any], code: str, kind: FailureKind
) -> None:
    with pytest.raises(StageFailure) as caught:
        decision_for(metric, outputs, references)
    assert (caught.value.code, caught.value.kind) == (code, kind)


def test_loss_against_labels() -> None:
    labels = RNG.integers(0, 10, 400)
    original = np.eye(10)[labels]
    engine = original.copy()
    engine[:20] = np.roll(engine[:20], 1, axis=1)  # 5 % wrong
    truth = TruthComparison(Decision("top1", "labels", "y", ""))
    truth.add(original[:100], engine[:100], labels[:100], 0)
    truth.add(original[100:], engine[100:], labels[100:], 100)
    found = truth.result(0)
    assert (found["baseline_value"], found["value"], found["loss_percent"]) == (1.0, 0.95, 5.0)
    assert 2 < found["loss_ci"][0] < 5 < found["loss_ci"][1] < 8
    assert found["enough_samples_for"] == 0.75
    with pytest.raises(StageFailure) as caught:
        truth.add(original[:2], engine[:2], np.array([3, 10]), 7)
    assert caught.value.code == "labels_out_of_range"
    assert "sample 8" in caught.value.detail


def test_positions_that_do_not_count() -> None:
    truth = TruthComparison(Decision("top1", "labels", "y", ""))
    scores = np.zeros((1, 4, 3))
    scores[..., 0] = 1
    truth.add(scores, scores, np.array([[0, 1, -100, -100]]), 0)
    assert truth.result(0)["value"] == 0.5


def test_an_engine_better_than_the_original_has_a_negative_loss() -> None:
    wanted = RNG.standard_normal((50, 6))
    truth = TruthComparison(Decision("normalized_error", "references", "y", ""))
    truth.add(wanted * 1.1, wanted * 1.05, wanted, 0)
    found = truth.result(0)
    assert found["baseline_value"] == pytest.approx(0.1)
    assert found["value"] == pytest.approx(0.05)
    assert found["loss_percent"] == pytest.approx(-5)


def test_the_worst_output_decides() -> None:
    outputs = {"y": OutputComparison("y", Kind.LOGITS), "boxes": OutputComparison("boxes", Kind.NUMBERS)}
    a, boxes = RNG.standard_normal((64, 10)), RNG.standard_normal((64, 5, 4))
    outputs["y"].add(a, a, 64)
    outputs["boxes"].add(boxes, boxes * 0.5, 64)
    decision = Decision("agreement", "agreement", "y", "", all_outputs=True)
    found = agreement_result(outputs, decision, 0)
    assert (found["metric"], found["output"]) == ("normalized_error", "boxes")
    assert found["loss_percent"] == pytest.approx(50)
    alone = agreement_result(outputs, Decision("agreement", "agreement", "y", ""), 0)
    assert alone["loss_percent"] == 0
    assert alone["loss_ci"] == [0, pytest.approx(300 / 64, rel=1e-4)]
