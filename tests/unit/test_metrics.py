"""The metrics of accuracy against known values and scikit-learn's, their losses, and which of them judges."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any, get_args

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import (
    f1_score,
    jaccard_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
    top_k_accuracy_score,
)

from app.domain.failures import FailureKind, StageFailure
from app.domain.spec import Metric
from app.errors import AppError
from app.jobs.metric_admission import check_metric
from workers.measure.accuracy import output_kind
from workers.measure.judge import decide
from workers.measure.stats import BlockSums, Level
from workers.measure.verdict import Verdict

RNG = np.random.default_rng(7)
N, C = 120, 12
LABELS = RNG.integers(0, C, N)
SCORES = (np.eye(C)[LABELS] * 1.5 + RNG.standard_normal((N, C))).astype(np.float32)
WORSE = (SCORES + 0.7 * RNG.standard_normal((N, C))).astype(np.float32)


def judged(
    original: Any, engine: Any, labels: Any = None, metric: Any = "auto", batch: int = 16, name: str = "logits"
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """One output, in batches."""
    verdict = None
    references = {} if labels is None else {"labels": np.asarray(labels)}
    for first in range(0, len(original), batch):
        part = slice(first, first + batch)
        a, b, truth = {name: original[part]}, {name: engine[part]}, {n: r[part] for n, r in references.items()}
        if verdict is None:
            kinds = {name: output_kind(name, a[name])}
            verdict = Verdict(decide(metric, kinds, a, truth), kinds, len(original))
        verdict.add(a, b, truth, len(a[name]), first)
    assert verdict is not None
    return verdict.result(Level())


def loss_is_points(figures: dict[str, Any]) -> None:
    points = 100 * (figures["baseline_value"] - figures["value"])
    assert figures["loss_percent"] == pytest.approx(points, abs=1e-3)
    assert figures["loss_ci"][0] <= figures["loss_percent"] <= figures["loss_ci"][1]


def test_class_scores_are_judged_as_scikit_learn_judges_them() -> None:
    found, _, notes = judged(SCORES, WORSE, LABELS)
    assert (found["metric"], found["basis"], found["units"]) == ("top1", "labels", N)
    assert not notes
    metrics = found["metrics"]
    assert set(metrics) == {"top1", "top5", "macro_f1", "agreement", "kl"}
    for side, scores in (("baseline_value", SCORES), ("value", WORSE)):
        answers = scores.argmax(axis=1)
        assert metrics["top1"][side] == pytest.approx((answers == LABELS).mean(), abs=1e-6)
        assert metrics["top5"][side] == pytest.approx(top_k_accuracy_score(LABELS, scores, k=5), abs=1e-6)
        assert metrics["macro_f1"][side] == pytest.approx(f1_score(LABELS, answers, average="macro"), abs=1e-6)
    for name in ("top1", "top5", "macro_f1"):
        loss_is_points(metrics[name])
        asked, _, _ = judged(SCORES, WORSE, LABELS, name)
        assert (asked["metric"], asked["loss_percent"]) == (name, metrics[name]["loss_percent"])
        assert asked["loss_ci"][0] < asked["loss_ci"][1]
    assert judged(SCORES, WORSE, LABELS, batch=1)[0] == found | {"why": found["why"]}


def test_macro_f1_of_several_labels_a_sample() -> None:
    wanted = RNG.integers(0, 2, (90, 4))
    logits = ((wanted * 2 - 1) + RNG.standard_normal((90, 4))).astype(np.float32)
    worse = (logits + RNG.standard_normal((90, 4))).astype(np.float32)
    for labels in (wanted, wanted.astype(bool), wanted.astype(np.float32)):
        found, _, _ = judged(logits, worse, labels, name="y")
        assert (found["metric"], found["basis"]) == ("macro_f1", "labels")
        assert "zeros and ones" in found["why"]
        assert found["baseline_value"] == pytest.approx(f1_score(wanted, logits > 0, average="macro"), abs=1e-6)
        assert found["value"] == pytest.approx(f1_score(wanted, worse > 0, average="macro"), abs=1e-6)
        loss_is_points(found)
    p, q = (1 / (1 + np.exp(-x)) for x in (logits, worse))
    assert judged(p, q, wanted, name="y")[0]["value"] == found["value"]  # 0.5 of probabilities


@pytest.mark.parametrize("shape", [(90,), (90, 1)])
def test_macro_f1_of_a_binary_classifier(shape: tuple[int, ...]) -> None:
    wanted = RNG.integers(0, 2, 90)
    logits = (wanted * 2 - 1 + 1.5 * RNG.standard_normal(90)).astype(np.float32)
    found, _, _ = judged(logits.reshape(shape), logits.reshape(shape) * 2, wanted, name="y")
    assert (found["metric"], found["loss_percent"]) == ("macro_f1", 0)
    assert found["value"] == pytest.approx(f1_score(wanted, logits > 0, average="macro"), abs=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
def test_label_maps_are_judged_by_intersection_over_union(axis: int) -> None:
    maps = RNG.integers(0, 5, (20, 9, 7)).astype(np.uint8)
    scores = np.eye(5)[maps] + 0.6 * RNG.standard_normal((20, 9, 7, 5))
    worse = scores + 0.4 * RNG.standard_normal(scores.shape)
    maps[:, :2] = 255
    counted = maps != 255
    found, _, _ = judged(np.moveaxis(scores, -1, axis), np.moveaxis(worse, -1, axis), maps, name="y")
    assert (found["metric"], found["units"]) == ("mean_iou", 20)
    assert ("axis 1" in found["why"]) is (axis == 1)
    for side, x in (("baseline_value", scores), ("value", worse)):
        answers = x.argmax(axis=-1)
        iou = jaccard_score(maps[counted], answers[counted], average="macro")
        assert found[side] == pytest.approx(iou, abs=1e-6)
        assert found["metrics"]["top1"][side] == pytest.approx((maps == answers)[counted].mean(), abs=1e-6)
    loss_is_points(found)
    wider = maps.astype(np.int64)
    wider[~counted] = -100
    assert judged(np.moveaxis(scores, -1, axis), np.moveaxis(worse, -1, axis), wider, name="y")[0] == found
    with pytest.raises(StageFailure) as caught:  # 255 is a class number where −100 can be written
        judged(np.moveaxis(scores, -1, axis), np.moveaxis(worse, -1, axis), maps.astype(np.int64), name="y")
    assert caught.value.code == "labels_out_of_range"
    assert "is 255" in caught.value.detail


def test_regression_is_judged_as_scikit_learn_judges_it() -> None:
    targets = RNG.standard_normal((80, 3)) * [1, 2, 3] + [1e6, 0, -5]
    original = targets + 0.3 * RNG.standard_normal(targets.shape)
    engine = original + 0.3 * RNG.standard_normal(targets.shape)
    found, _, _ = judged(original, engine, targets, name="y")
    assert (found["metric"], found["basis"]) == ("r2", "labels")
    assert "numbers" in found["why"]
    metrics = found["metrics"]
    assert set(metrics) == {"r2", "mae", "rmse", "normalized_error", "psnr"}
    for side, y in (("baseline_value", original), ("value", engine)):
        r2 = r2_score(targets, y, multioutput="variance_weighted")
        rmse = np.sqrt(((targets - y) ** 2).mean())
        assert metrics["r2"][side] == pytest.approx(r2, abs=1e-5)
        assert metrics["mae"][side] == pytest.approx(mean_absolute_error(targets, y), rel=1e-5)
        assert metrics["rmse"][side] == pytest.approx(rmse, rel=1e-5)
    loss_is_points(found)
    for name in ("mae", "rmse"):
        asked, _, _ = judged(original, engine, targets, name, name="y")
        grown = 100 * (asked["value"] / asked["baseline_value"] - 1)
        assert asked["loss_percent"] == pytest.approx(grown, rel=1e-3)
        assert 0 < asked["loss_ci"][0] < asked["loss_percent"] < asked["loss_ci"][1]
    one = targets[:, 1]
    single = judged(original[:, 1:2], engine[:, 1:2], one, "rmse", name="y")[0]
    assert single["baseline_value"] == pytest.approx(root_mean_squared_error(one, original[:, 1]), rel=1e-5)


def test_an_original_without_error_is_measured_by_the_spread_of_the_targets() -> None:
    targets = RNG.standard_normal(60) * 2
    for metric in ("mae", "rmse"):
        found, _, _ = judged(targets, targets + 0.02, targets, metric, name="y")
        assert found["loss_percent"] == pytest.approx(100 * 0.02 / targets.std(), rel=1e-4)
    constant = np.full(60, 3.0)
    assert judged(constant, constant + 0.1, constant, "mae", name="y")[0]["loss_percent"] == pytest.approx(10)


def test_r2_of_equal_targets_is_undefined() -> None:
    constant, y = np.full(40, 3.0), 3 + 0.1 * RNG.standard_normal(40)
    with pytest.raises(StageFailure) as caught:
        judged(y, y, constant, "r2", name="y")
    assert (caught.value.code, caught.value.kind) == ("metric_undefined", FailureKind.DATA)
    found, _, notes = judged(y, y + 0.3, constant, name="y")
    assert found["metric"] == "normalized_error"
    assert found["loss_percent"] > 5
    assert any("All targets are 3" in note for note in notes)
    assert any("do not differ" in note for note in notes)
    _, _, notes = judged(y * 50, y * 50, y, name="y")
    assert any("R² below 0" in note for note in notes)


def test_labels_that_do_not_count_are_left_out() -> None:
    some = LABELS.copy()
    some[::3] = -100
    kept = some >= 0
    found, _, _ = judged(SCORES, WORSE, some)
    expected, _, _ = judged(SCORES[kept], WORSE[kept], LABELS[kept])
    assert found["units"] == kept.sum()
    for name in ("top1", "top5", "macro_f1"):
        assert found["metrics"][name]["value"] == expected["metrics"][name]["value"]
    with pytest.raises(StageFailure) as caught:
        judged(SCORES, WORSE, np.where(kept, LABELS, -1))
    assert caught.value.code == "labels_out_of_range"
    with pytest.raises(StageFailure) as caught:
        judged(SCORES, WORSE, np.full(N, -100))
    assert caught.value.code == "metric_undefined"


def test_a_single_class_works_and_is_told() -> None:
    found, _, notes = judged(SCORES[:20], SCORES[:20], np.full(20, 4))
    assert found["metric"] == "top1"
    assert notes == ["All labels are class 4: the figures say nothing of the other classes."]
    found, _, notes = judged(SCORES[:20, 0], SCORES[:20, 0], np.zeros(20, int), name="y")
    assert found["metric"] == "macro_f1"
    assert any("All targets are 0" in note for note in notes)


@pytest.mark.parametrize("labels", [LABELS[:1], None])
def test_one_sample_carries_nothing(labels: Any) -> None:
    found, _, notes = judged(SCORES[:1], SCORES[:1], labels)
    assert found["enough_samples_for"] == 100
    assert any("one sample" in note for note in notes)


def test_classes_that_an_output_names_are_judged_by_the_labels() -> None:
    answers, worse = SCORES.argmax(axis=1), WORSE.argmax(axis=1)
    found, _, _ = judged(answers, worse, LABELS, name="label", batch=3)
    assert (found["metric"], found["basis"]) == ("top1", "labels")
    assert found["value"] == pytest.approx((worse == LABELS).mean(), abs=1e-6)
    f1 = judged(answers, worse, LABELS, "macro_f1", name="label", batch=3)[0]
    assert f1["value"] == pytest.approx(f1_score(LABELS, worse, average="macro"), abs=1e-6)
    wild = worse.copy()
    wild[0], wild[1] = -5, 10**6  # whatever an engine answers
    assert judged(answers, wild, LABELS, "macro_f1", name="label")[0]["loss_percent"] >= f1["loss_percent"]
    many = np.arange(N) * 1000
    assert "macro_f1" not in judged(many, many, many, name="label")[0]["metrics"]
    with pytest.raises(StageFailure) as caught:
        judged(many, many, many, "macro_f1", name="label")
    assert caught.value.code == "metric_mismatch"
    maps = RNG.integers(0, 4, (20, 6, 6))
    engine = (maps + (maps == 3)) % 4
    found, _, _ = judged(maps, engine, maps, name="segments")
    iou = jaccard_score(maps.ravel(), engine.ravel(), average="macro")
    assert (found["metric"], found["value"]) == ("mean_iou", pytest.approx(iou, abs=1e-6))
    found, _, _ = judged(maps * 5000, maps * 5000, maps * 5000, name="segments")
    assert found["metric"] == "top1"


def test_scores_without_labels_show_kl_and_agreement() -> None:
    found, _, _ = judged(SCORES, WORSE)
    assert (found["metric"], found["basis"]) == ("agreement", "agreement")
    kl = found["metrics"]["kl"]
    assert kl["loss_percent"] == pytest.approx(100 * (1 - np.exp(-kl["value"])), rel=1e-4)
    asked, outputs, _ = judged(SCORES, WORSE, metric="kl")
    assert (asked["metric"], asked["value"]) == ("kl", outputs["logits"]["mean_kl"])
    assert 0 < asked["loss_ci"][0] < asked["loss_percent"] < asked["loss_ci"][1] < 100
    assert judged(SCORES, SCORES, metric="kl")[0]["loss_percent"] == 0


def test_embeddings_show_how_they_stand_to_each_other() -> None:
    a = RNG.standard_normal((60, 32))
    b = a + 0.5 * RNG.standard_normal(a.shape)
    found, _, _ = judged(a, b, name="embedding")
    assert found["metric"] == "cosine"
    metrics = found["metrics"]

    def similar(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        return np.asarray(u @ u.T)

    upper = np.triu_indices(60, 1)
    rho = spearmanr(similar(a)[upper], similar(b)[upper]).statistic
    assert metrics["spearman"]["value"] == pytest.approx(rho, abs=1e-4)
    nearest = [(similar(x) - 3 * np.eye(60)).argmax(axis=1) for x in (a, b)]
    assert metrics["neighbours"]["value"] == pytest.approx((nearest[0] == nearest[1]).mean(), abs=1e-6)
    for name in ("spearman", "neighbours"):
        loss_is_points(metrics[name])
        asked = judged(a, b, metric=name, name="embedding")[0]
        assert asked["loss_ci"][0] < asked["loss_percent"] < asked["loss_ci"][1]
        assert judged(a, a, metric=name, name="embedding")[0]["loss_percent"] == 0
    collapsed = judged(a, np.ones_like(a), metric="spearman", name="embedding")[0]
    assert collapsed["loss_percent"] == 100
    with pytest.raises(StageFailure) as caught:
        judged(a[:2], b[:2], metric="neighbours", name="embedding")
    assert caught.value.code == "metric_undefined"
    assert any("at least 3 samples" in note for note in judged(a[:2], b[:2], name="embedding")[2])


def test_equal_samples_are_each_others_neighbours() -> None:
    a = np.repeat(RNG.standard_normal((10, 16)), 3, axis=0)
    b = a + 1e-9 * RNG.standard_normal(a.shape)
    assert judged(a, b, metric="neighbours", name="embedding")[0]["value"] == 1


def test_other_numbers_show_their_psnr() -> None:
    a = RNG.random((20, 3, 8, 8)) * 10
    b = a + 0.1 * RNG.choice([-1, 1], a.shape)
    found, _, _ = judged(a, b, metric="psnr", name="y")
    assert found["value"] == pytest.approx(20 * np.log10(np.ptp(a) / 0.1), rel=1e-4)
    assert found["loss_percent"] == pytest.approx(10 / np.ptp(a), rel=1e-4)
    assert judged(a, b, name="y")[0]["metrics"].keys() == {"normalized_error", "psnr"}
    same = judged(a, a, metric="psnr", name="y")[0]
    assert (same["value"], same["baseline_value"], same["loss_percent"]) == (200, 200, 0)
    with pytest.raises(StageFailure) as caught:
        judged(np.ones((4, 3)), np.ones((4, 3)), metric="psnr", name="y")
    assert caught.value.code == "metric_undefined"


FLOATS = RNG.standard_normal((4, 1)).astype(np.float32)
MAPS = {"y": RNG.standard_normal((4, 5, 8, 8))}


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "expected"),
    [
        ("auto", {"y": FLOATS}, np.arange(4), ("r2", "labels", "targets")),
        ("auto", {"y": FLOATS[:, 0]}, np.zeros((4, 1)), ("r2", "labels", "targets")),
        ("mae", {"y": FLOATS}, np.arange(4), ("mae", "labels", "targets")),
        ("auto", MAPS, np.zeros((4, 8, 8), int), ("mean_iou", "labels", "classes")),
        ("auto", MAPS, np.zeros((4, 1, 8, 8), int), ("mean_iou", "labels", "classes")),
        ("top1", MAPS, np.zeros((4, 8, 8), int), ("top1", "labels", "classes")),
        ("auto", {"t": np.zeros((4, 3, 7))}, np.zeros((4, 7), int), ("top1", "labels", "classes")),
        ("macro_f1", {"logits": SCORES[:4]}, LABELS[:4], ("macro_f1", "labels", "classes")),
        ("auto", {"embedding": SCORES[:4]}, LABELS[:4], ("cosine", "agreement", None)),
        ("spearman", {"y": SCORES[:4]}, LABELS[:4], ("spearman", "agreement", None)),
        ("psnr", {"y": SCORES[:4]}, LABELS[:4], ("psnr", "agreement", None)),
    ],
)
def test_which_metric_judges(metric: Any, outputs: Any, labels: Any, expected: tuple[Any, ...]) -> None:
    decision = decide(metric, {n: output_kind(n, x) for n, x in outputs.items()}, outputs, {"labels": labels})
    assert (decision.metric, decision.basis, decision.form) == expected


@pytest.mark.parametrize(
    ("metric", "outputs", "labels", "code"),
    [
        ("top1", {"logits": SCORES[:4]}, LABELS[:4].astype(np.float32), "dataset_dtype_mismatch"),
        ("auto", {"logits": SCORES[:4]}, LABELS[:4] + 0.5, "dataset_dtype_mismatch"),
        ("top5", {"logits": SCORES[:4, :5]}, LABELS[:4] % 5, "metric_mismatch"),
        ("mean_iou", {"logits": SCORES[:4]}, LABELS[:4], "metric_mismatch"),
        ("mean_iou", MAPS, np.zeros((4, 16, 16), int), "labels_mismatch"),
        ("auto", MAPS, np.zeros((4, 16, 16), int), "labels_mismatch"),
        ("mae", {"logits": SCORES[:4]}, LABELS[:4], "labels_mismatch"),
        ("rmse", {"logits": SCORES[:4]}, None, "metric_mismatch"),
        ("macro_f1", {"logits": SCORES[:4]}, None, "metric_mismatch"),
        ("kl", {"hidden": np.zeros((4, 7, 3))}, None, "metric_mismatch"),
        ("spearman", {"y": np.zeros(4)}, None, "metric_mismatch"),
        ("psnr", {"y": np.zeros(4, int)}, None, "metric_mismatch"),
    ],
)
def test_what_does_not_fit_is_refused(metric: Any, outputs: Any, labels: Any, code: str) -> None:
    kinds = {n: output_kind(n, x) for n, x in outputs.items()}
    with pytest.raises(StageFailure) as caught:
        decide(metric, kinds, outputs, {} if labels is None else {"labels": labels})
    assert caught.value.code == code
    assert caught.value.remedy


def test_labels_whose_shape_changes_on_the_way_are_refused() -> None:
    outputs, labels = {"y": np.zeros((2, 4, 4, 3))}, np.zeros((2, 4, 4), int)
    kinds = {"y": output_kind("y", outputs["y"])}
    verdict = Verdict(decide("auto", kinds, outputs, {"labels": labels}), kinds)
    verdict.add(outputs, outputs, {"labels": labels}, 2, 0)
    with pytest.raises(StageFailure) as caught:
        verdict.add({"y": np.zeros((2, 5, 5, 3))}, {"y": np.zeros((2, 5, 5, 3))}, {"labels": labels}, 2, 2)
    assert caught.value.code == "labels_mismatch"


def test_macro_f1_says_what_few_samples_of_a_class_carry() -> None:
    labels = np.repeat([0, 1], [98, 2])
    scores = np.eye(2)[labels]
    found, _, _ = judged(scores, scores, labels, "macro_f1")
    assert (found["loss_percent"], found["enough_samples_for"]) == (0, 100)
    balanced = np.repeat([0, 1], 300)
    found, _, _ = judged(np.eye(2)[balanced], np.eye(2)[balanced], balanced, "macro_f1")
    assert found["enough_samples_for"] == 1.0
    assert found["loss_ci"] == [-1.0, 1.0]


def test_memory_of_class_counts_does_not_grow_with_the_samples() -> None:
    sums = BlockSums(5000)
    assert 16 <= sums.blocks <= 512
    tracemalloc.start()
    peaks = []
    for n in (200, 4000):
        tracemalloc.reset_peak()
        labels = RNG.integers(0, 1000, n)
        scores = np.zeros((n, 1000), np.float32)
        scores[np.arange(n), labels] = 1
        base = tracemalloc.get_traced_memory()[0]
        found, _, _ = judged(scores, scores, labels, "macro_f1")
        assert found["value"] == 1
        peaks.append(tracemalloc.get_traced_memory()[1] - base)
    tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_intervals_cover() -> None:
    """The 95 % interval of a macro F1's loss holds the loss on all data for about 95 % of the draws."""
    labels = RNG.integers(0, 3, 20_000)
    original = np.eye(3)[labels] + 0.8 * RNG.standard_normal((20_000, 3))
    engine = original + 0.3 * RNG.standard_normal(original.shape)
    whole = 100 * (
        f1_score(labels, original.argmax(1), average="macro") - f1_score(labels, engine.argmax(1), average="macro")
    )
    hits = 0
    for _ in range(60):
        chosen = RNG.choice(20_000, 200, replace=False)
        low, high = judged(original[chosen], engine[chosen], labels[chosen], "macro_f1", batch=200)[0]["loss_ci"]
        hits += low <= whole <= high
    assert hits >= 52


SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (10,), (4, 4), (1, 4, 4), (3, 4, 4), (4, 4, 3), (7, 5)]


def _anything(rng: np.random.Generator, n: int) -> np.ndarray[Any, Any]:
    shape = (n, *SHAPES[rng.integers(len(SHAPES))])
    x = rng.standard_normal(shape) * 10.0 ** rng.integers(-8, 8) * rng.integers(0, 2)
    match rng.integers(5):
        case 0:
            x = np.asarray(rng.integers(-1, 12, shape))
        case 1:
            x = np.full(shape, 3.0)
        case 2:
            x.reshape(-1)[0] = [np.nan, np.inf][rng.integers(2)]
    return x if x.dtype.kind == "i" else x.astype(np.float32)


@pytest.mark.parametrize("seed", range(120))
def test_whatever_comes_there_are_figures_or_a_typed_failure(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = [1, 2, 5, 20][rng.integers(4)]
    original = _anything(rng, n)
    engine = original + (0.1 * rng.standard_normal(original.shape)).astype(original.dtype)
    labels = None if rng.random() < 0.3 else np.nan_to_num(_anything(rng, n), posinf=1)
    if labels is not None and rng.random() < 0.3:
        labels = np.nan_to_num(original, posinf=1)
    metric = get_args(Metric)[rng.integers(len(get_args(Metric)))] if rng.random() < 0.6 else "auto"
    name = ["logits", "y", "embedding"][rng.integers(3)]
    refused: StageFailure | None = None
    try:
        found, outputs, notes = judged(original, engine, labels, metric, batch=4, name=name)
        json.dumps([found, outputs, notes], allow_nan=False)
        assert found["metric"] in found["metrics"]
    except StageFailure as failure:
        refused = failure
    if refused is not None:
        assert refused.kind in (FailureKind.REQUEST, FailureKind.DATA)
        assert refused.remedy
    arrays = [] if labels is None else [{"name": "labels", "dtype": str(labels.dtype), "shape": [*labels.shape[1:]]}]
    tensor = {"name": name, "dtype": str(original.dtype), "shape": ["batch", *original.shape[1:]]}
    try:
        check_metric(metric, "/validation/dataset_id", arrays, [tensor])
    except AppError:
        assert refused is not None or metric == "auto"  # what is refused with the job would fail in the job
