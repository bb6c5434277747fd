"""The errand of a worker that builds for jobs that wait: a job of its own goes first, and what fails stays typed."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.domain.failures import infrastructure_failure, model_failure
from app.jobs.ledger import LeaseLost
from app.prebuilds.service import PrebuildHold
from app.settings import Settings
from workers import kernel, offer
from workers import prebuilder as module
from workers.backends.tensorrt import TensorRtRtxBackend
from workers.equipment import Equipment
from workers.pipeline.isolated import Interrupted
from workers.prebuilder import Prebuilder, targets_of
from workers.spare import SpareTime

HOLD = PrebuildHold("job_1", "tnt", "me", "tensorrt-rtx", "8.9")


class Service:
    """What it asks and tells, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.holds = True
        self._hold: PrebuildHold | None = HOLD

    def take(self, *_: Any) -> PrebuildHold | None:
        taken, self._hold = self._hold, None
        return taken

    def renew(self, _: PrebuildHold) -> bool:
        return self.holds

    def end(self, _: PrebuildHold) -> None:
        self.told.append("end")

    def retry_later(self, _: PrebuildHold) -> None:
        self.told.append("retry")

    def give_back(self, _: PrebuildHold) -> None:
        self.told.append("back")


def made(tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, build: Any) -> Prebuilder:
    monkeypatch.setattr(Equipment, "workspace", lambda *_: nullcontext())
    monkeypatch.setattr(Prebuilder, "_optimizer", lambda _, __, ___, held: SimpleNamespace(build=lambda: build(held)))
    anything: Any = service
    spare = SpareTime(threading.Event())
    equipment = Equipment("me", Settings(home=tmp_path), anything, anything, anything, {}, "f", b"")
    return Prebuilder(anything, equipment, spare)


def test_it_builds_for_what_is_not_here() -> None:
    found = targets_of({})["tensorrt-rtx"]
    assert {"8.6", "8.9", "12.0"} <= set(found)
    assert ("fp8" in found["8.6"].precisions, "fp8" in found["8.9"].precisions) == (False, True)
    own = {"gpu": {"compute_capability": "8.9"}}
    assert set(targets_of(own)["tensorrt-rtx"]) == set(found) - {"8.9"}, "its own jobs come by its queue"
    assert "tensorrt" not in targets_of({}), "which builds on the GPU"


def test_a_backend_that_breaks_its_contract_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a plug-in's")

    monkeypatch.setattr(TensorRtRtxBackend, "targets", broken)
    assert targets_of({}) == {}


def test_a_workers_queues_are_those_of_its_device_of_its_kind_and_of_itself() -> None:
    infos = [kernel.BackendInfo("tensorrt-rtx", {}, ("cuda",), ("fp32",))]
    hardware = {"id": "gpu-l4", "gpu": {"compute_capability": "8.9"}}
    found = [q for q in offer.queues_of(infos, hardware) if not q.endswith(".pt2")]
    assert found == ["anneal.cpu", "anneal.cuda", "anneal.cuda-8.9", "anneal.hw.gpu-l4"]
    found = [q for q in offer.queues_of([], {"id": "cpu-x"}) if not q.endswith(".pt2")]
    assert found == ["anneal.cpu", "anneal.hw.cpu-x"]


def test_a_job_that_arrives_ends_it_and_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, running = Service(), threading.Event()

    def build(held: Any) -> None:
        running.set()
        while not held.should_stop():
            pass
        raise Interrupted

    prebuilder = made(tmp_path, service, monkeypatch, build)
    thread = threading.Thread(target=prebuilder.build_one)
    thread.start()
    assert running.wait(10)
    with prebuilder._spare.jobs_first():
        assert service.told == ["back"]
        assert not prebuilder.build_one(), "nothing is built beside a job"
    thread.join()


@pytest.mark.parametrize(
    ("error", "told", "again"),
    [
        (None, ["end"], True),
        (model_failure("invalid_graph", "a cycle"), ["end"], True),
        (infrastructure_failure("io_error", "the disk"), ["retry"], False),
        (LeaseLost("job_1"), [], True),
    ],
)
def test_how_it_ends(
    error: Exception | None, told: list[str], again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_: Any) -> None:
        if error is not None:
            raise error

    service = Service()
    prebuilder = made(tmp_path, service, monkeypatch, build)
    assert prebuilder.build_one() is again
    assert service.told == told
    assert not prebuilder.build_one(), "there is no other"


def test_what_the_jobs_own_worker_has_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RENEW_S", 0.0)
    service = Service()
    service.holds = False

    def build(held: Any) -> None:
        assert held.should_stop()
        raise Interrupted

    assert made(tmp_path, service, monkeypatch, build).build_one()
    assert service.told == []
