"""Two engines in one bundle, as the verdict and the report see them: both keep the limit, the gain is beyond noise."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.spec import OptimizationSpec
from app.jobs.report_page import report_page
from tests.factories.search_world import candidate
from workers.bundle_readme import readme
from workers.kernel import backends
from workers.pipeline.by_batch import by_batch
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.final import final_metrics
from workers.pipeline.outcome import nodes_kept
from workers.pipeline.pairs import ID, PairRun, together
from workers.pipeline.select import BASELINE, Tried, Verdict, judge
from workers.pipeline.shape_rules import narrowest
from workers.search.state import Pair

QUIET = {size: {"ratio": 1.0, "low": 0.99, "high": 1.01} for size in ("1", "8")}
PROVEN = {"source": "dataset", "loss_percent": 0.1, "bound_percent": 0.5, "samples": 600, "part": "confirm"}
PROVEN |= {"metric": "top1", "kind": "labels", "complete": True}


def spec(**changes: Any) -> OptimizationSpec:
    return OptimizationSpec.model_validate({"model_id": "m", **changes})


def figures(at_1: float, at_8: float, memory: float = 100.0, width: float = 0.01) -> dict[str, Any]:
    def at(gain: float) -> dict[str, Any]:
        around = {"ratio": gain, "low": gain * (1 - width), "high": gain * (1 + width)}
        return {"speedup": around, "throughput_ratio": around, "p50_ms": 10 / gain, "mean_ms": 10 / gain}

    batches = {"1": at(at_1), "8": at(at_8)}
    return {"batches": batches, "size_bytes": 4_000_000, "peak_memory_mb": memory, "cold_start_ms": 50.0}


def a_run(cid: str, gains: tuple[float, float], loss: float = 0.1) -> CandidateRun:
    """A finalist that was confirmed and timed in full."""
    run = CandidateRun.of(candidate(cid))
    file = FileRef("model.onnx", f"{abs(hash(cid)):064x}"[:64], 2_000_000)
    run.build = SimpleNamespace(outputs={"engine": ArtifactRef((file,))}, data={"runtime": {}})  # type: ignore[assignment]
    run.tried.accuracy = {**PROVEN, "loss_percent": loss, "bound_percent": 5 * loss}
    told = {**run.tried.accuracy, "engine_digest": run.engine.digest}
    run.confirmed = SimpleNamespace(data=told)  # type: ignore[assignment]
    run.tried.figures = figures(*gains)
    return run


def evaluator(**changes: Any) -> Any:
    data = {"inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}], "structure": {"quantized": False}}
    original = ArtifactRef((FileRef("model.onnx", "0" * 64, 4_000_000),))
    export = SimpleNamespace(data=data, outputs={"model": original})
    return SimpleNamespace(spec=spec(**changes), export=export, baseline_backend="onnxruntime")


def both_of(runs: list[CandidateRun], small: str, large: str, **changes: Any) -> PairRun:
    pair = Pair(small, large, 2, (2, 4), {i: {"1": 1.0, "2": 1.5, "4": 1.6, "8": 1.0} for i in (small, large)})
    found = together(evaluator(**changes), pair, runs)
    assert found is not None
    return found


def picked(runs: list[CandidateRun], **changes: Any) -> Verdict:
    baseline = Tried(BASELINE, "fp32", True, figures=figures(1.0, 1.0))
    return judge(spec(**changes), baseline, [r.tried for r in runs], QUIET)


def test_two_engines_are_one_of_the_files_that_were_judged() -> None:
    runs = [a_run("int8-a", (3.0, 0.8)), a_run("bf16-b", (1.5, 2.5))]
    both = both_of(runs, "int8-a", "bf16-b")
    assert [f.name for f in both.engine.files] == ["large/model.onnx", "small/model.onnx"]
    assert both.judged_digest == both.engine.digest
    assert (both.runtime["input"], both.runtime["axis"]) == ("x", 0)
    members = backends()[both.plan.backend].members(both.runtime)
    assert [(m.folder, m.backend, m.most) for m in members] == [
        ("small", "onnxruntime", 2),
        ("large", "onnxruntime", None),
    ]
    assert both.plan.precision == "int8+bf16"
    assert not both.plan.lossless
    assert both.plan.name == "int8-a for batches of up to 2, bf16-b for batches of 3 and more"
    assert nodes_kept(both) == []
    assert both.answers(2).run is runs[0]
    assert both.answers(3).run is runs[1]
    runs[0].confirmed.data["engine_digest"] = "another"  # type: ignore[union-attr]
    assert both.judged_digest != both.engine.digest, "then nothing is packed"


def test_one_that_fell_after_the_search_takes_the_other_along() -> None:
    runs = [a_run("int8-a", (3.0, 0.8)), a_run("bf16-b", (1.5, 2.5))]
    runs[1].drop("final", "it answers otherwise at another shape")
    assert together(evaluator(), Pair("int8-a", "bf16-b", 2, (2, 4), {}), runs) is None


@pytest.mark.parametrize(
    ("small", "large", "both", "ships"),
    [
        # Each is slower than the original somewhere: alone neither ships.
        ((3.0, 0.8), (0.7, 2.5), (3.0, 2.5), ID),
        ((3.0, 1.2), (2.0, 2.5), (3.0, 2.5), ID),
        ((3.0, 1.2), (2.0, 1.23), (3.0, 1.23), "int8-a"),  # 2.5 % are no gain that is beyond doubt
        ((3.0, 1.2), (2.0, 2.5), (3.0, 1.2), "int8-a"),  # nor is one that the full measurement does not show
        ((3.0, 1.2), (2.0, 2.5), (2.7, 2.5), "int8-a"),  # what it costs at the other size
        ((3.0, 0.8), (0.7, 2.5), (3.0, 0.9), BASELINE),
        ((3.0, 0.8), (0.7, 2.5), (0.9, 2.5), BASELINE),
    ],
)
def test_two_ship_where_they_gain_beyond_doubt_over_one(small: Any, large: Any, both: Any, ships: str) -> None:
    runs = [a_run("int8-a", small), a_run("bf16-b", large)]
    pair = both_of(runs, "int8-a", "bf16-b")
    pair.tried.figures = figures(*both, memory=200.0)
    assert picked([*runs, pair]).picked == ships
    if ships != ID:
        assert pair.tried.reasons


@pytest.mark.parametrize(
    ("gain", "undisturbed", "ships"),
    [
        ((1.06, 1.04, 1.08), True, ID),
        ((1.06, 1.02, 1.10), True, "int8-a"),
        ((1.06, 1.04, 1.08), False, "int8-a"),  # too few rounds to go by
    ],
)
def test_the_gain_over_one_is_that_of_the_same_rounds(gain: Any, undisturbed: bool, ships: str) -> None:
    """Their gains over the original reach into each other, as the original itself was slow in some rounds."""
    runs = [a_run("int8-a", (3.0, 1.2)), a_run("bf16-b", (2.0, 1.27))]
    pair = both_of(runs, "int8-a", "bf16-b")
    pair.tried.figures = figures(3.0, 1.27, width=0.05)
    runs[0].tried.figures = figures(3.0, 1.2, width=0.05)
    beside = dict(zip(("ratio", "low", "high"), gain, strict=True))
    told = {"undisturbed": undisturbed, "speedup": beside, "throughput_ratio": beside}
    pair.tried.figures["batches"]["8"]["beside"] = {"int8-a": told}
    assert picked([*runs, pair]).picked == ships


def test_the_memory_of_both_counts() -> None:
    runs = [a_run("int8-a", (3.0, 1.2)), a_run("bf16-b", (2.0, 2.5))]
    pair = both_of(runs, "int8-a", "bf16-b")
    pair.tried.figures = figures(3.0, 2.5, memory=200.0)
    limited = {"constraints": {"max_memory_mb": 150.0}}
    assert picked([*runs, pair], **limited).picked == "int8-a"
    assert "memory_mb 200.000 over the limit of 150.0" in pair.tried.reasons


@pytest.mark.parametrize(("who", "strict"), [("int8-a", False), ("bf16-b", False), ("bf16-b", True)])
def test_either_has_to_keep_the_limit(who: str, strict: bool) -> None:
    """By what it loses; or, where the job is strict, by what its samples prove."""
    gains = {"int8-a": (3.0, 0.8), "bf16-b": (0.7, 2.5)}
    loss = 0.3 if strict else 2.0  # the bound is five times as much
    runs = [a_run(cid, at, loss if cid == who else 0.1) for cid, at in gains.items()]
    wanted = {"validation": {"strict": strict}}
    pair = both_of(runs, "int8-a", "bf16-b", **wanted)
    pair.tried.figures = figures(3.0, 2.5)
    assert pair.tried.accuracy == next(r for r in runs if r.plan.id == who).tried.accuracy, "it is told of the worse"
    assert picked([*runs, pair], **wanted).picked == BASELINE
    assert any("accuracy" in why for why in pair.tried.reasons)


@pytest.mark.parametrize(("at_8", "ships"), [(0.99, ID), (0.9, BASELINE)])
def test_the_original_answers_where_nobody_is_faster(at_8: float, ships: str) -> None:
    """It is no slower than itself: two processes of it differ by more than a percent."""
    runs = [a_run("int8-a", (3.0, 0.7))]
    pair = both_of(runs, "int8-a", BASELINE)
    pair.tried.figures = figures(3.0, at_8, width=0.001)
    assert picked([*runs, pair]).picked == ships
    assert {f.name: f.sha256 for f in pair.engine.files}["large/model.onnx"] == "0" * 64
    assert pair.plan.name == "int8-a for batches of up to 2, the original for batches of 3 and more"


def a_proof(pair: PairRun, runs: list[CandidateRun]) -> Any:
    verdict = picked([*runs, pair])
    assert verdict.picked == ID
    baseline = Tried(BASELINE, "fp32", True, figures=figures(1.0, 1.0))
    export = SimpleNamespace(data={"inputs": evaluator().export.data["inputs"]})
    benchmark = SimpleNamespace(data={})
    return SimpleNamespace(
        spec=spec(),
        verdict=verdict,
        picked=pair,
        baseline=baseline,
        runs=[*runs, pair],
        export=export,
        benchmark=benchmark,
    )


def test_the_report_tells_who_answers_what_and_what_both_cost() -> None:
    runs = [a_run("int8-a", (3.0, 1.2)), a_run("bf16-b", (2.0, 2.5), loss=0.15)]
    pair = both_of(runs, "int8-a", "bf16-b")
    pair.tried.figures = {**figures(3.0, 2.5, memory=200.0), "size_bytes": 6_000_000}
    proof = a_proof(pair, runs)
    told = by_batch(proof)
    assert told is not None
    assert [(e.candidate, e.least, e.most, e.accuracy_verdict) for e in told.engines] == [
        ("int8-a", 1, 2, "proven"),
        ("bf16-b", 3, None, "proven"),
    ]
    assert told.border == [2, 4]
    rows: list[Mapping[str, Any]] = [row.model_dump() for row in told.batches]
    assert [(r["batch"], r["answered_by"], r["speedup"], r["measured"]) for r in rows] == [
        (1, "int8-a", 3.0, "full"),
        (2, "int8-a", None, "short timing"),
        (4, "bf16-b", None, "short timing"),
        (8, "bf16-b", 2.5, "full"),
    ]
    assert (rows[3]["small_speedup"], rows[3]["large_speedup"]) == (1.2, 2.5)
    assert (told.costs["memory_mb"], told.costs["alone"]["candidate"], told.costs["alone"]["memory_mb"]) == (
        *(200.0, "int8-a", 100.0),
    )
    final = final_metrics(proof)
    assert (final.speedup, final.size_mb, final.accuracy_loss_percent) == ("3.0x", 6.0, 0.15)

    page = report_page({"by_batch": told.model_dump(mode="json")}, "job_1")
    for words in (
        "Which engine answers which batch",
        "between batch sizes 2 and 4",
        "200 MB of memory",
        "int8-a alone",
    ):
        assert words in page
    assert "Which engine answers" not in report_page({"by_batch": None}, "job_1")
    text = readme("m", "by-batch", {"engine": {"by_batch": told.model_dump(mode="json")}})
    for words in (
        "Two engines for `onnxruntime`",
        "batches of 3 and more: bf16-b (onnxruntime), accuracy loss 0.15",
        "batch size 8: 2.50x as fast as the original, either alone 1.2x and 2.5x",
        "both engines are loaded",
    ):
        assert words in text


def test_both_bound_the_sizes_that_the_bundle_takes() -> None:
    assert narrowest([{"length": [2, None]}, {"length": [4, 64]}, {"width": [None, 3]}]) == {
        "length": [4, 64],
        "width": [None, 3],
    }


def test_a_job_has_it_by_default_where_latency_counts() -> None:
    assert [spec(objective=o).most_engines for o in ("latency", "throughput", "cost")] == [2, 1, 1]
    assert spec(engines_per_bundle=1).most_engines == 1
    assert spec(engines_per_bundle=2, objective="throughput").most_engines == 2
