"""`"measure": "again"`: timings of other jobs are not taken, those of this job are, and so are graphs and builds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.db.orm import StageResult
from app.domain.artifact_key import ArtifactRef
from app.domain.failures import StageFailure
from workers import kernel
from workers.pipeline.isolated import StageOutcome
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner


class Ledger:
    """What the database keeps of stage calls."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], StageResult] = {}

    def recall(self, tenant_id: str, key: str) -> StageResult | None:
        return self.rows.get((tenant_id, key))

    def remember(self, _claim: Any, row: StageResult) -> None:
        self.rows[row.tenant_id, row.key] = row

    def progress(self, *_: Any) -> None:
        pass


class Counting(StageRunner):
    """Whose stages do nothing but say how often they ran."""

    ran = 0

    def _attempt(self, _call: Any) -> tuple[StageOutcome, dict[str, ArtifactRef]]:
        type(self).ran += 1
        return StageOutcome([], {"run": self.ran}, [], 0.1), {}


def runner(ledger: Ledger, job_id: str, *, again: bool = False) -> StageRunner:
    return Counting(
        claim=cast("Any", SimpleNamespace(job_id=job_id, tenant_id="t", owner="w")),
        ledger=cast("Any", ledger),
        isolated=cast("Any", None),
        workspace=cast("Any", None),
        hardware={},
        fingerprint="machine",
        limits=Limits(1, 1, 1),
        lock_dir=Path(),
        should_stop=lambda: False,
        measure_again=again,
    )


def test_only_timings_of_other_jobs_are_left() -> None:
    ledger, inputs = Ledger(), {"model": ArtifactRef(())}
    timings = [name for name, stage in kernel.stages().items() if stage.exclusive_device]
    assert {"benchmark", "sweep", "profile"} <= set(timings)

    def run(job_id: str, stage: str, *, again: bool = False) -> tuple[bool, int]:
        outcome = runner(ledger, job_id, again=again).run(stage, inputs, {"backend": "onnxruntime"})
        return outcome.cached, outcome.data["run"]

    assert run("a", "profile") == (False, 1)
    assert run("b", "profile") == (True, 1)
    assert run("c", "profile", again=True) == (False, 2)
    assert run("c", "profile", again=True) == (True, 2), "delivered once more after a crash, it goes on from its own"
    assert run("d", "profile") == (True, 2), "the newest stands for those who take what there is"
    assert run("e", "profile", again=True) == (False, 3)
    assert run("a", "build") == (False, 4)
    assert run("f", "build", again=True) == (True, 4)


def test_a_stage_is_not_run_on_another_kind_of_artifact() -> None:
    ledger = Ledger()
    plan_file = ArtifactRef((), kind="tensorrt-plan")
    with pytest.raises(StageFailure, match="takes onnx or openvino-ir, and there is tensorrt-plan") as caught:
        runner(ledger, "a").run("build", {"model": plan_file}, {"backend": "openvino"})
    assert caught.value.code == "wrong_artifact"
    built = runner(ledger, "a").run("build", {"model": ArtifactRef((), kind="onnx")}, {"backend": "openvino"})
    assert not built.cached
