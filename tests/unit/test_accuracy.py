"""Comparing outputs: kinds, distances against known values, and which metric judges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.domain.failures import FailureKind, StageFailure
from workers.measure.accuracy import Kind, OutputComparison, check_outputs, output_kind, same_scores
from workers.measure.judge import Decision, decide
from workers.measure.stats import Level
from workers.measure.targets import TargetTruth
from workers.measure.truth import ClassTruth
from workers.measure.verdict import Verdict

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
        ("out", RNG.standard_normal((4, 10)), Kind.UNCLEAR),
        ("pred_class", RNG.standard_normal((4, 10)), Kind.LOGITS),
        ("boxes", RNG.random((4, 4)) * 200, Kind.UNCLEAR),
        ("out", RNG.standard_normal((4, 24)), Kind.UNCLEAR),
        ("out", softmax(RNG.standard_normal((4, 1000)) * 50), Kind.LOGITS),  # sure of itself: norm near 1
        ("out", unit((4, 384)), Kind.EMBEDDING),
        ("out", RNG.standard_normal((4, 384)), Kind.UNCLEAR),
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


LOGITS = {"logits": RNG.standard_normal((4, 10))}
UNNAMED = {"y": RNG.standard_normal((4, 10))}
HIDDEN = {"hidden": RNG.standard_normal((4, 7, 16))}


@pytest.mark.parametrize(
    ("metric", "outputs", "references", "expected"),
    [
        ("auto", LOGITS, {"labels": np.zeros(4, int)}, ("top1", "labels")),
        ("auto", LOGITS, {"labels": np.zeros((4, 1), int)}, ("top1", "labels")),
        ("auto", {"t": np.zeros((4, 7, 3))}, {"labels": np.zeros((4, 7), int)}, ("top1", "labels")),
        ("auto", UNNAMED, {"labels": np.zeros(4, int)}, ("top1", "labels")),
        ("top1", UNNAMED, {"y": UNNAMED["y"]}, ("top1", "references")),
        ("auto", UNNAMED, {"y": UNNAMED["y"]}, ("normalized_error", "references")),
        ("agreement", UNNAMED, {}, ("agreement", "agreement")),
        ("auto", LOGITS, LOGITS, ("top1", "references")),
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
        ("auto", UNNAMED, {"labels": np.zeros((4, 3), int)}, "labels_mismatch", FailureKind.DATA),
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
    truth = ClassTruth(-1, original[:100], labels[:100])
    truth.add(original[:100], engine[:100], labels[:100], 0)
    truth.add(original[100:], engine[100:], labels[100:], 100)
    found = truth.result("top1", Level())
    assert (found["baseline_value"], found["value"], found["loss_percent"]) == (1.0, 0.95, 5.0)
    assert 2 < found["loss_ci"][0] < 5 < found["loss_ci"][1] < 8
    assert found["enough_samples_for"] == 0.75
    with pytest.raises(StageFailure) as caught:
        truth.add(original[:2], engine[:2], np.array([3, 10]), 7)
    assert caught.value.code == "labels_out_of_range"
    assert "sample 8" in caught.value.detail


def test_positions_that_do_not_count() -> None:
    scores, labels = np.zeros((1, 4, 3)), np.array([[0, 1, -100, -100]])
    scores[..., 0] = 1
    truth = ClassTruth(-1, scores, labels)
    truth.add(scores, scores, labels, 0)
    assert truth.result("top1", Level())["value"] == 0.5
    nothing = ClassTruth(-1, scores, labels)
    nothing.add(scores, scores, np.full((1, 4), -100), 0)
    with pytest.raises(StageFailure) as caught:
        nothing.result("top1", Level())
    assert (caught.value.code, caught.value.kind) == ("metric_undefined", FailureKind.DATA)


def test_an_engine_better_than_the_original_has_a_negative_loss() -> None:
    wanted = RNG.standard_normal((50, 6))
    truth = TargetTruth(wanted)
    truth.add(wanted * 1.1, wanted * 1.05, wanted, 0)
    found = truth.result("normalized_error", Level())
    assert found["baseline_value"] == pytest.approx(0.1)
    assert found["value"] == pytest.approx(0.05)
    assert found["loss_percent"] == pytest.approx(-5)


def verdict_of(
    outputs: dict[str, tuple[Any, Any]], references: dict[str, Any] | None = None, metric: Any = "auto", batch: int = 16
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`outputs`: name → (the original's values, the engine's)."""
    references = references or {}
    rows = len(next(iter(outputs.values()))[0])
    verdict = None
    for first in range(0, rows, batch):
        part = slice(first, first + batch)
        a, b = ({n: pair[side][part] for n, pair in outputs.items()} for side in (0, 1))
        truth = {n: r[part] for n, r in references.items()}
        if verdict is None:
            kinds = {n: output_kind(n, v) for n, v in a.items()}
            verdict = Verdict(decide(metric, kinds, a, truth), kinds)
        verdict.add(a, b, truth, len(next(iter(a.values()))), first)
    assert verdict is not None
    return verdict.result(Level())[:2]


SCORES = RNG.standard_normal((64, 10))
BOXES = RNG.random((64, 4)) * 200 + np.array([0, 0, 0, 500])  # the last is always the largest


def test_the_worst_output_decides() -> None:
    boxes = RNG.standard_normal((64, 5, 4))
    pairs = {"logits": (SCORES, SCORES), "boxes": (boxes, boxes * 0.5)}
    found, outputs = verdict_of(pairs)
    assert (found["metric"], found["output"], found["basis"]) == ("normalized_error", "boxes", "agreement")
    assert found["loss_percent"] == pytest.approx(50)
    assert (outputs["logits"]["loss_percent"], outputs["boxes"]["loss_percent"]) == (0, pytest.approx(50))
    alone, outputs = verdict_of(pairs, metric="agreement")
    assert (alone["output"], alone["loss_percent"]) == ("logits", 0)
    assert alone["loss_ci"] == [0, pytest.approx(100 * (1 - 0.025 ** (1 / 64)), rel=1e-4)]
    assert alone["bound_percent"] == pytest.approx(100 * (1 - 0.05 ** (1 / 64)), rel=1e-4)
    assert "loss_percent" not in outputs["boxes"]


def test_numbers_are_not_judged_by_their_largest_column() -> None:
    """Boxes and forecasts look like scores: their largest column stays the largest while the values are far off."""
    found, outputs = verdict_of({"y": (BOXES, BOXES * 0.7)})
    assert outputs["y"]["agreement"] == 1
    assert (found["metric"], found["loss_percent"]) == ("normalized_error", pytest.approx(30))
    assert "nothing says which" in found["why"]
    found, _ = verdict_of({"y": (BOXES, BOXES * 0.7)}, {"y": BOXES})
    assert (found["metric"], found["basis"]) == ("normalized_error", "references")
    assert found["loss_percent"] == pytest.approx(30)


def test_of_scores_without_a_name_the_worse_of_both_counts() -> None:
    close = np.stack([np.full(64, 100.0), np.full(64, 100.01)], axis=1)
    found, _ = verdict_of({"y": (close, close[:, ::-1])})  # all classes flip, the numbers hardly move
    assert (found["metric"], found["loss_percent"]) == ("agreement", 100)
    found, _ = verdict_of({"y": (close, close[:, ::-1])}, {"y": close})
    assert (found["metric"], found["basis"], found["loss_percent"]) == ("top1", "references", 100)


def test_numbers_that_add_up_to_one_by_chance_are_found_out() -> None:
    shares = BOXES.copy()
    shares[0] = [0.1, 0.2, 0.3, 0.4]
    for references in ({}, {"y": shares}):
        found, outputs = verdict_of({"y": (shares, shares * 0.7)}, references, batch=1)
        assert (found["metric"], found["loss_percent"]) == ("normalized_error", pytest.approx(30))
        assert outputs["y"]["kind"] == "scores_or_numbers"
    p = softmax(SCORES)
    for references in ({}, {"y": p}):
        found, _ = verdict_of({"y": (p, p * 0.99)}, references, batch=1)
        assert (found["metric"], found["loss_percent"]) == ("agreement" if not references else "top1", 0)


def test_a_second_head_cannot_degrade_behind_the_labels() -> None:
    labels = {"labels": SCORES.argmax(axis=1)}
    pairs = {"boxes": (BOXES, BOXES * 0.7), "logits": (SCORES, SCORES)}
    found, outputs = verdict_of(pairs, labels)
    assert (found["output"], found["metric"], found["basis"]) == ("boxes", "normalized_error", "agreement")
    assert found["loss_percent"] == pytest.approx(30)
    assert "'boxes' loses more and decides" in found["why"]
    assert found["enough_samples_for"] == pytest.approx(300 / 64, rel=1e-4)  # of the labels: the larger
    assert (outputs["logits"]["metric"], outputs["logits"]["basis"]) == ("top1", "labels")
    assert outputs["logits"]["loss_percent"] == 0
    found, _ = verdict_of(pairs, labels, metric="top1")  # asked for: that output alone
    assert (found["output"], found["loss_percent"]) == ("logits", 0)
    found, _ = verdict_of({"boxes": (BOXES, BOXES * (1 + 1e-7)), "logits": (SCORES, SCORES)}, labels)
    assert (found["output"], found["metric"]) == ("logits", "top1")  # floats summed in another order: no loss
    found, _ = verdict_of(pairs, {"logits": SCORES})
    assert (found["output"], found["basis"]) == ("boxes", "agreement")  # references cover one head only, too


def test_outputs_that_say_the_same_as_the_scores_are_judged_by_the_labels() -> None:
    """An engine that gets other samples wrong than the original has no loss, whichever form its answer takes."""
    labels = np.arange(64) % 10
    original, engine = np.eye(10)[labels] * 4, np.eye(10)[labels] * 4
    original[:8], engine[8:16] = np.roll(original[:8], 1, axis=1), np.roll(engine[8:16], 1, axis=1)
    pairs = {
        "logits": (original, engine),
        "probabilities": (softmax(original), softmax(engine)),
        "label": (original.argmax(axis=1), engine.argmax(axis=1)),
    }
    found, outputs = verdict_of(pairs, {"labels": labels})
    assert (found["output"], found["loss_percent"]) == ("logits", 0)
    assert {o["basis"] for o in outputs.values()} == {"labels"}
    assert outputs["label"]["agreement"] == 0.75
    pairs["label"] = (pairs["label"][0], np.zeros(64, int))  # and still none of them may break
    found, _ = verdict_of(pairs, {"labels": labels})
    assert (found["output"], found["basis"]) == ("label", "labels")
    assert found["loss_percent"] > 70
    other = (original.argmax(axis=1) + (np.arange(64) == 63), pairs["label"][1])  # the same, but for the last sample
    _, outputs = verdict_of({**pairs, "label": other}, {"labels": labels})
    assert outputs["label"]["basis"] == "agreement"


def test_labels_find_their_head() -> None:
    labels = {"labels": SCORES.argmax(axis=1)}
    wide = RNG.standard_normal((64, 10))
    for pairs in (
        {"y0": (wide[:, :4], wide[:, :4]), "y1": (SCORES, SCORES)},
        {"y": (wide, wide), "logits": (SCORES, SCORES)},
    ):
        found, _ = verdict_of(pairs, labels, batch=64)
        assert found["output"] == list(pairs)[1]


def test_same_scores() -> None:
    masked = SCORES.copy()
    masked[:, 3] = -np.inf
    assert same_scores(masked, masked)
    assert same_scores(SCORES, SCORES.argmax(axis=1)[:, np.newaxis])
    assert not same_scores(SCORES, SCORES * 2)
    assert not same_scores(SCORES, SCORES[:, :5])
    assert not same_scores(np.full((2, 3), np.nan), np.ones((2, 3)))
