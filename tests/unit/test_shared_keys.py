"""What a helper makes is found under the very keys that the job's own worker asks for: two desks, one store of stage
results, and stages that are not run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.artifact_key import ArtifactRef, FileRef
from app.domain.spec import OptimizationSpec
from workers.artifacts import ONNX
from workers.candidates import Candidate, Step
from workers.pipeline.budget import Budget
from workers.pipeline.candidate_run import CandidateRun
from workers.pipeline.evaluate import Evaluator
from workers.pipeline.job_data import Data
from workers.pipeline.protocol import Limits
from workers.pipeline.runner import StageRunner
from workers.pipeline.stage_calls import Outcome
from workers.search.calls import Call
from workers.search.desk import Desk
from workers.search.requests import Confirm, Examine, Judge, Make, Refer, Request, Subject

SPEC = OptimizationSpec.model_validate(
    {"model_id": "m", "calibration": {"dataset_id": "c"}, "validation": {"dataset_id": "v", "max_samples": 500}}
)
_OUTPUTS: dict[str, list[str]] = {
    "quantize": ["model", "ranges"],
    "build": ["engine"],
    "reference_outputs": ["outputs"],
    "validate": [],
    "compatibility": [],
}
_DATA: dict[str, dict[str, Any]] = {"build": {"runtime": {}}, "validate": {"samples": 500, "engine_digest": "d"}}


def ref(name: str) -> ArtifactRef:
    return ArtifactRef((FileRef(name, hashlib.sha256(name.encode()).hexdigest(), 10),), kind=ONNX)


class Store:
    """Of stage results; what the workers of a job share."""

    def __init__(self) -> None:
        self.rows: dict[str, Any] = {}

    def recall(self, _tenant: str, key: str) -> Any:
        return self.rows.get(key)

    def remember(self, _claim: Any, row: Any) -> None:
        self.rows[row.key] = row

    def progress(self, *_: Any) -> None: ...


@pytest.fixture
def worker(tmp_path: Path) -> Callable[[str], tuple[Desk, list[str]]]:
    """A desk of its own for the job, and the stages that this worker had to compute."""
    store, folders = Store(), iter(range(1000))

    def run(request: Any, computed: list[str]) -> Any:
        computed.append(request.stage)
        made = _OUTPUTS.get(request.stage, ["model"])
        for name in made:
            folder = Path(request.outputs) / name
            folder.mkdir(parents=True)
            told = json.dumps([request.stage, request.options, request.inputs], sort_keys=True)
            (folder / "file").write_text(hashlib.sha256(told.encode()).hexdigest())
        data = _DATA.get(request.stage, {"samples": 500, "usable": 500})
        return SimpleNamespace(data=data, notes=[], outputs=made, seconds=1.0, reusable=True)

    def new(name: str) -> tuple[Desk, list[str]]:
        computed: list[str] = []
        workspace = SimpleNamespace(
            new_call=lambda stage: tmp_path / f"{next(folders)}-{stage}",
            fetch=lambda found: Path("/") / found.digest,
            store=lambda paths: ArtifactRef(
                tuple(FileRef(p.name, hashlib.sha256(p.read_bytes()).hexdigest(), 64) for p in paths)
            ),
        )
        told: dict[str, Any] = {
            "claim": SimpleNamespace(job_id="j", tenant_id="t", owner=name),
            "ledger": store,
            "isolated": SimpleNamespace(run=lambda request, **_: run(request, computed)),
            "workspace": workspace,
        }
        runner = StageRunner(
            **told,
            hardware={},
            fingerprint="machine",
            limits=Limits(100, 1 << 30, 1 << 20),
            lock_dir=tmp_path,
            should_stop=lambda: False,
        )
        export = Outcome("export", "k" * 64, {}, {}, {"model": ref("model")}, {}, {}, cached=True, seconds=0.0)
        data = Data(ref("calibration"), ref("validation"), same=False, shapes=None, judging=900, calibrating=100)
        return Desk(Evaluator(runner, SPEC, export, data, Budget(600.0), "onnxruntime")), computed

    return new


def quantized(cid: str, method: str = "minmax", *kept: str) -> Candidate:
    options = {"recipe": "static_int8", "method": method, "exclude_nodes": list(kept)}
    steps = (Step("simplify", {}), Step("quantize", options, ("calibration",)))
    return Candidate(cid, cid, "onnxruntime", "int8", steps)


PLAN, BASE = quantized("int8"), quantized("base")
MENDED = Subject(quantized("mended", "minmax", "conv_1"), BASE)


@pytest.mark.parametrize(
    ("request_", "computed"),
    [
        (Make(Subject(PLAN), 100.0), ["simplify", "quantize", "build"]),
        (
            Judge(Subject(PLAN), 96, apart=True, until=100.0),
            ["simplify", "quantize", "build", "reference_outputs", "validate"],
        ),
        (Judge(MENDED, 96, apart=True, until=100.0), None),
        (Refer(500.0), ["reference_outputs"]),
        (Examine("openvino", 500.0), ["compatibility"]),
        (Confirm(Subject(PLAN), 0.975, apart=True, until=100.0), None),
        (Confirm(MENDED, 0.99, apart=False, until=100.0), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Make | Judge | Refer | Examine | Confirm) else "",
)
def test_what_another_one_computed_is_looked_up(
    request_: Request, computed: list[str] | None, worker: Callable[[str], tuple[Desk, list[str]]]
) -> None:
    helper, theirs = worker("helper")
    helper.answer(Call.from_json(json.loads(json.dumps(Call(request_, 1.0).to_json()))).request)
    assert theirs
    assert computed in (None, theirs)
    owner, mine = worker("owner")
    owner.answer(request_)
    assert not mine


def test_the_verdict_s_own_look_finds_what_was_confirmed_elsewhere(
    worker: Callable[[str], tuple[Desk, list[str]]],
) -> None:
    helper, _ = worker("helper")
    helper.answer(Refer(500.0))
    helper.answer(Confirm(Subject(PLAN), 0.975, apart=True, until=100.0))
    owner, mine = worker("owner")
    run = CandidateRun.of(PLAN)
    assert owner.evaluator.make(run, 300.0)
    assert owner.evaluator.confirm(run, 0.975, 300.0)
    assert not mine
    assert run.confirmed is not None
    assert run.confirmed.cached
    assert owner.evaluator.confirm(run, 0.99, 300.0)
    assert mine == ["validate"], "of another confidence it is another look, on the same outputs"
