"""Optimization profiles: what is derived, what is taken from the job, and what contradicts the model or itself."""

from __future__ import annotations

from typing import Any

import pytest

from app.domain.failures import FailureKind, StageFailure
from workers.backends.options import parsed
from workers.backends.tensorrt.options import BuildOptions
from workers.backends.tensorrt.profiles import best_profile, fits, profiles_for, to_json
from workers.kernel import TensorSpec
from workers.measure.synthetic import synthetic_feeds

IMAGE = TensorSpec("image", "float32", ("batch", 3, 224, 224))
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))


def shapes(low: list[int], opt: list[int], high: list[int]) -> dict[str, list[int]]:
    return {"min": low, "opt": opt, "max": high}


def made(inputs: list[TensorSpec], **options: Any) -> list[Any]:
    return profiles_for(inputs, parsed(BuildOptions, options, "TensorRT"))


def refused(inputs: list[TensorSpec], **options: Any) -> StageFailure:
    with pytest.raises(StageFailure) as caught:
        made(inputs, **options)
    assert (caught.value.code, caught.value.kind) == ("invalid_profile", FailureKind.REQUEST)
    assert caught.value.remedy
    return caught.value


def test_a_static_model_needs_none() -> None:
    fixed = TensorSpec("x", "float32", (1, 8))
    assert made([fixed], batch_sizes=[1, 8]) == []
    assert made([fixed], shapes={"x": shapes([1, 8], [1, 8], [1, 8])}) == []


def test_one_profile_is_derived_for_each_measured_batch_size() -> None:
    first, second = made([IMAGE], batch_sizes=[8, 1])
    assert first["image"] == ((1, 3, 224, 224),) * 3, "batch 1 is tuned for alone"
    assert second["image"] == ((1, 3, 224, 224), (8, 3, 224, 224), (16, 3, 224, 224)), "validation runs up to 16"
    assert len(made([IMAGE], batch_sizes=[1, 2, 4, 8, 16, 32])) == 3
    assert made([IMAGE], batch_sizes=[64])[0]["image"][2][0] == 64


def test_symbols_are_one_size_wherever_they_stand() -> None:
    (profile,) = made([IDS, MASK], shapes={"input_ids": shapes([1, 8], [4, 64], [8, 128])})
    assert profile["attention_mask"] == profile["input_ids"] == ((1, 8), (4, 64), (8, 128))


@pytest.mark.parametrize(
    "spec",
    [
        IDS,
        TensorSpec("image", "float32", ("n", "c", "h", "w")),
        TensorSpec("x", "float32", ("n", "t", 6)),
        TensorSpec("x", "float32", ("n", 4, "a", 2, "b")),
    ],
    ids=lambda s: f"{s.name}{len(s.shape)}",
)
@pytest.mark.parametrize("batch", [1, 8, 16])
def test_what_the_service_feeds_fits_a_derived_profile(spec: TensorSpec, batch: int) -> None:
    profiles = made([spec], batch_sizes=[1, 8])
    feeds = synthetic_feeds([spec], batch, None, 0)
    chosen = best_profile(profiles, {n: a.shape for n, a in feeds.items()})
    assert chosen == (0 if batch == 1 else 1)


def test_several_profiles_and_the_nearest_is_taken() -> None:
    small, large = shapes([1, 1], [1, 32], [4, 64]), shapes([1, 1], [32, 128], [64, 512])
    profiles = made([IDS], profiles=[{"input_ids": small}, {"input_ids": large}])
    assert to_json(profiles) == [{"input_ids": small}, {"input_ids": large}]
    assert best_profile(profiles, {"input_ids": (1, 32)}) == 0
    assert best_profile(profiles, {"input_ids": (4, 64)}) == 0
    assert best_profile(profiles, {"input_ids": (16, 32)}) == 1
    assert best_profile(profiles, {"input_ids": (65, 32)}) is None
    assert not fits(profiles[0]["input_ids"], (1, 32, 1))


def test_profiles_that_contradict_the_model() -> None:
    name = refused([IMAGE], shapes={"picture": shapes([1], [1], [1])})
    assert name.tensor == "picture"
    assert "image" in name.detail
    rank = refused([IMAGE], shapes={"image": shapes([1, 3], [1, 3], [1, 3])})
    assert "4" in rank.detail
    fixed = refused([IMAGE], shapes={"image": shapes([1, 3, 128, 224], [1, 3, 224, 224], [1, 3, 224, 224])})
    assert "axis 2" in fixed.detail
    assert "224" in fixed.detail
    order = refused([IDS], shapes={"input_ids": shapes([4, 8], [2, 8], [8, 8])})
    assert "min ≤ opt ≤ max" in order.detail
    refused([IDS], shapes={"input_ids": shapes([0, 8], [2, 8], [8, 8])})
    refused([IDS], shapes={"input_ids": shapes([1, 8], [2, 8, 8], [8, 8])})
    refused([IDS], shapes={"input_ids": {"min": [1, 8]}})
    static = TensorSpec("x", "float32", (1, 8))
    refused([static], shapes={"x": shapes([1, 8], [1, 9], [1, 9])})


def test_profiles_that_contradict_each_other() -> None:
    both = {"input_ids": shapes([1, 8], [4, 64], [8, 128]), "attention_mask": shapes([1, 8], [4, 32], [8, 128])}
    symbol = refused([IDS, MASK], shapes=both)
    assert "'sequence'" in symbol.detail
    assert symbol.tensor == "attention_mask"
    one = {"input_ids": both["input_ids"]}
    assert "the same" in refused([IDS, MASK], profiles=[one, one]).detail
    assert "other inputs" in refused([IDS, MASK], profiles=[one, {"attention_mask": one["input_ids"]}]).detail
    refused([IDS, MASK], profiles=[one], shapes=one)


def test_an_option_that_is_none() -> None:
    with pytest.raises(StageFailure) as caught:
        parsed(BuildOptions, {"optimization_level": 9}, "TensorRT")
    assert caught.value.code == "invalid_backend_options"
    with pytest.raises(StageFailure):
        parsed(BuildOptions, {"fp16": True}, "TensorRT")
