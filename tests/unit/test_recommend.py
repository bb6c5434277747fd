"""Recommendations follow from figures: what the profile of the shipped engine says of its limits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.spec import OptimizationSpec
from workers.pipeline import recommend


def _config(batch: int, threads: int, *by_pass: float) -> dict[str, Any]:
    where = {"status": "measured", "batch": batch, "instances": 1, "threads": threads}
    return {**where, "throughput_by_pass": list(by_pass), "throughput_qps": sum(by_pass) / len(by_pass)}


def _found(profile: dict[str, Any] | None = None, sweep: list[dict[str, Any]] | None = None, **rest: Any) -> Any:
    explanation = SimpleNamespace(
        profile=SimpleNamespace(data=profile) if profile is not None else None,
        deployment=SimpleNamespace(data={"configurations": sweep}) if sweep is not None else None,
    )
    return SimpleNamespace(explanation=explanation, verdict=SimpleNamespace(primary_batch="1", unclaimed=None), **rest)


SCALES = [_config(1, 1, 10.0, 11.0), _config(1, 2, 19.0, 20.0)]
DENSE = {"by_op": {"Conv": 0.5, "MatMul": 0.3, "Add": 0.2}, "layers_ms": 800.0, "distorted": None}
COMPUTING = {"weight_bandwidth_share": 0.05, "inference_ms": 800.0, **DENSE}


def _said(sweep: list[dict[str, Any]], data: dict[str, Any]) -> str:
    figures = {"batch": 1, "engine_bytes": 4e8, "copy_bytes_per_s": 1e10, **data}
    return " ".join(recommend._limits(_found(figures, sweep)))


@pytest.mark.parametrize(
    ("data", "sweep", "says"),
    [
        ({"weight_bandwidth_share": 0.7, "inference_ms": 60.0}, [], "waits for memory"),
        ({"weight_bandwidth_share": 0.7, "inference_ms": 60.0, "engine_bytes": 4e6}, [], ""),  # it fits into the caches
        ({"weight_bandwidth_share": 0.3, "inference_ms": 60.0}, [], ""),
        ({"weight_bandwidth_share": None, "copy_bytes_per_s": None, "inference_ms": 60.0}, [], ""),
        (COMPUTING, SCALES, "1.9x [1.7, 2.0] as fast as one. A GPU is worth a try"),
        ({**COMPUTING, "inference_ms": 0.5}, SCALES, ""),
        (COMPUTING, [], ""),  # nobody knows whether the work can be shared out
        (COMPUTING, [_config(1, 1, 10.0, 11.0), _config(1, 2, 10.0, 11.0)], ""),  # it cannot
        ({**COMPUTING, "by_op": {"LSTM": 0.9, "Conv": 0.1}}, SCALES, "LSTM takes 90 %"),  # and no word of a GPU
    ],
)
def test_what_limits_the_engine(data: dict[str, Any], sweep: list[dict[str, Any]], says: str) -> None:
    said = _said(sweep, data)
    assert says in said
    assert bool(says) == bool(said)
    assert ("GPU" in said) == ("GPU" in says)


def test_nothing_follows_from_a_profile_that_measures_the_profiler() -> None:
    gelu = [{"name": "gelu", "op_type": "Gelu", "ms": 0.412, "share": 0.78}]
    told = {"layers": gelu, "layer_count": 5, "by_op": {"Gelu": 0.78}, "weight_bandwidth_share": 0.01}
    small = {**told, "inference_ms": 0.024, "layers_ms": 0.53, "distorted": "the layers take 0.53 ms together"}
    assert _said([], small) == ""
    assert _said([], {**told, "inference_ms": 1.5, "layers_ms": 0.53, "distorted": None}) == "", "most is not in layers"
    assert "Gelu takes 78 %" in _said([], {**told, "inference_ms": 0.5, "layers_ms": 0.53, "distorted": None})


def test_a_gain_by_batching_comes_with_its_interval() -> None:
    sweep = [_config(1, 2, 100.0, 110.0), _config(8, 2, 300.0, 330.0), _config(8, 1, 900.0, 900.0)]
    (said,) = recommend._deployment(_found(sweep=sweep))
    assert "at batch size 8 one caller gets 315 samples/s, 3.0x [2.7, 3.3] of batch size 1" in said
    assert not [*recommend._deployment(_found(sweep=[sweep[0], _config(8, 2, 120.0, 300.0)]))], "not beyond the noise"
    assert not [*recommend._deployment(_found())]


def _run(name: str, ratio: float, loss: float, *, full: bool = True, width: float = 0.1) -> Any:
    figures = {"batches": {"1": {"speedup": {"ratio": ratio, "low": ratio - width, "high": ratio + width}}}}
    accuracy = {"loss_percent": loss, "loss_ci": [loss - 0.5, loss + 0.5], "metric": "top1", "samples": 500}
    tried = SimpleNamespace(accuracy=accuracy, figures=figures if full else None, failed=None)
    return SimpleNamespace(plan=SimpleNamespace(name=name, lossless=False), tried=tried, figures=figures)


def _offers(limit: float, *runs: Any) -> list[str]:
    spec = OptimizationSpec.model_validate(
        {"model_id": "m", "validation": {"max_accuracy_loss_percent": limit}, "benchmark": {"batch_sizes": [1]}}
    )
    picked = _run("the pick", 1.5, 0.1)
    return [*recommend._out_of_reach(_found(spec=spec, picked=picked, runs=[picked, *runs]))]


@pytest.mark.parametrize(
    ("limit", "loss", "offered"),
    [(1, 2.4, True), (1, 5.1, False), (1, 62, False), (5, 12, False), (5, 9, True), (0, 0.6, True), (0, 2, False)],
)
def test_only_a_loss_near_the_limit_is_offered(limit: float, loss: float, offered: bool) -> None:
    said = _offers(limit, _run("int8", 3.0, loss))
    assert bool(said) == offered
    if offered:
        interval = f"{loss:.2f} % [{loss - 0.5:.2f}, {loss + 0.5:.2f}] (top1, 500 samples)"
        assert f"int8 ran 3.00x [2.90, 3.10] (at batch size 1) as fast as the original but loses {interval}" in said[0]


def test_no_gain_is_named_that_the_pick_may_have_too() -> None:
    assert not _offers(1, _run("int8", 1.8, 2, width=0.4))
    assert "by a short timing" in _offers(1, _run("int8", 3.0, 2, full=False))[0]
