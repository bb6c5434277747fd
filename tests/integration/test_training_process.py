"""A training in the processes in which jobs run it: killed, cancelled, diverging, and without the time for it."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.failures import StageFailure
from tests.factories import programs
from workers.installation import KEY_BYTES, Installation
from workers.pipeline.isolated import Interrupted, IsolatedRunner, StageOutcome
from workers.pipeline.protocol import Limits, StageRequest

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the extra `torch`"),
    pytest.mark.filterwarnings("ignore"),
]

HANDED = Installation(b"k" * KEY_BYTES).to_json()
IMAGE = {"input": ("float32", ("batch", 1, 8, 8))}


class Calls:
    """Calls of the stage `train`, one after the other."""

    def __init__(self, runner: IsolatedRunner, folder: Path) -> None:
        self.runner, self.folder, self.told, self.count = runner, folder, [""], 0
        programs.folder(
            programs.brittle(), folder / "program", IMAGE, {"y": ("float32", ("batch", 5))}, {"batch": (1, 64)}
        )
        for part, seed in (("training", 1), ("data", 2)):
            (folder / part).mkdir()
            images = np.random.default_rng(seed).standard_normal((96, 1, 8, 8), dtype=np.float32)
            np.savez(folder / part / "data.npz", input=images)

    def run(
        self, model: Path | None = None, stop: Callable[[], bool] = lambda: False, **options: Any
    ) -> tuple[StageOutcome, Path]:
        self.count += 1
        work, out = (self.folder / f"{self.count}-{part}" for part in ("work", "out"))
        work.mkdir()
        out.mkdir()
        paths = {"model": str(model or self.folder / "program")}
        paths |= {n: str(self.folder / n) for n in ("training", "data")}
        known = {"op_types": ["Conv", "Gemm", "Relu"], "learning_rate": 1e-3, "seconds": 900.0, **options}
        request = StageRequest("train", known, paths, str(work), str(out), {}, Limits(200, 8 << 30, 1 << 30), HANDED)
        self.told.append("")
        tell = lambda _, message: self.told.append(message)  # noqa: E731
        return self.runner.run(request, on_progress=tell, should_stop=stop), out / "model"

    def steps(self) -> bool:
        """Whether it makes steps just now."""
        return self.told[-1].startswith("step")


@pytest.fixture(scope="module")
def runner() -> Iterator[IsolatedRunner]:
    found = IsolatedRunner()
    found.start()
    yield found
    found.close()


@pytest.fixture
def calls(runner: IsolatedRunner, tmp_path: Path) -> Calls:
    return Calls(runner, tmp_path)


def test_a_training_killed_in_the_middle_goes_on_from_its_last_checkpoint(calls: Calls) -> None:
    """The second of two calls is killed, and made again from what the first one left; it ends as if nothing had been.
    A killed call ends within ten seconds, as a cancelled one does."""
    terms = {"epochs": 60, "rounds": 2}
    first, checkpoint = calls.run(round=1, **terms)
    half = first.data["training"]["steps"]
    assert 0 < half < first.data["training"]["steps_planned"]
    stopped: list[float] = []

    def stop() -> bool:
        if calls.steps():
            stopped.append(time.monotonic())
        return bool(stopped)

    with pytest.raises(Interrupted):
        calls.run(checkpoint, stop, round=2, **terms)
    assert time.monotonic() - stopped[0] < 10
    assert not list((calls.folder / f"{calls.count}-out").rglob("program.pt2"))
    again, made = calls.run(checkpoint, round=2, **terms)
    told = again.data["training"]
    assert [e["step"] for e in told["curve"] if e["step"] <= half] == [
        e["step"] for e in first.data["training"]["curve"]
    ]
    assert told["steps"] > half
    assert {p.name for p in made.iterdir()} == {"program.pt2", "learned_ranges.json"}
    assert told["loss"] <= first.data["training"]["loss"]
    json.dumps(again.data, allow_nan=False)


def test_a_training_that_diverges_and_one_without_time_say_so(calls: Calls) -> None:
    with pytest.raises(StageFailure) as caught:
        calls.run(epochs=100_000, seconds=0.001)
    assert caught.value.code == "training_budget_too_short"
    assert not any(message.startswith("step") for message in calls.told), "before it begins"
    images = np.random.default_rng(1).standard_normal((96, 1, 8, 8), dtype=np.float32)
    images[7] *= 1e37  # finite, and its convolutions are not
    np.savez(calls.folder / "training" / "data.npz", input=images)
    with pytest.raises(StageFailure) as caught:
        calls.run()
    assert (caught.value.code, caught.value.stage) == ("training_diverged", "train")
    assert "nan" in caught.value.detail or "inf" in caught.value.detail
