"""The errand of a worker that answers calls of others' jobs: its own job goes first, and what fails stays typed."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.domain.failures import infrastructure_failure, model_failure
from app.jobs.ledger import LeaseLost
from app.settings import Settings, WorkerSettings
from app.sharing.service import HelpHold
from workers import helping as module
from workers import offer
from workers.equipment import Equipment
from workers.hardware import describe, fingerprint
from workers.helping import Helper
from workers.kinds import Kind, kind_of
from workers.pipeline.isolated import Interrupted
from workers.search.calls import Call
from workers.search.requests import Make, Subject
from workers.spare import SpareTime
from workers.telemetry.watch import StageSeen, Watch

HOLD = HelpHold("job_1", "tnt", "me", "c" * 64, 1, 1)


class Service:
    """What it asks and tells, in order."""

    def __init__(self) -> None:
        self.settings = WorkerSettings(lease_s=0.4)
        self.told: list[str] = []
        self.holds = True
        self.busy: list[bool] = []
        self._hold: HelpHold | None = HOLD

    def take(self, *_: Any) -> HelpHold | None:
        taken, self._hold = self._hold, None
        return taken

    def renew(self, _: HelpHold) -> bool:
        if not self.holds:
            raise LeaseLost("job_1")
        return False

    def elsewhere(self, *_: Any) -> bool:
        return self.busy.pop(0) if self.busy else False

    def __getattr__(self, name: str) -> Any:
        def note(_: HelpHold, key: str = "") -> None:
            self.told.append(f"{name} {key}".strip())

        return note


class Told(Watch):
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def helped(self, outcome: str) -> None:
        self.outcomes.append(outcome)


class Setup:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        monkeypatch.setattr(Equipment, "workspace", lambda *_: nullcontext())
        monkeypatch.setattr(Helper, "_answer", lambda _, __, ___, should_stop: answer(should_stop))
        self.service, self.told, self.interrupted = Service(), Told(), threading.Event()
        self.spare, self.willing = SpareTime(threading.Event()), True
        isolated: Any = type("Isolated", (), {"interrupt": lambda _: self.interrupted.set()})()
        anything: Any = self.service
        told: Any = self.told
        equipment = Equipment("me", Settings(home=tmp_path), anything, anything, isolated, {}, "f", b"")
        rest: Any = (self.spare, told, lambda: self.willing)
        self.helper = Helper(anything, anything, equipment, Kind("p", "s"), [], *rest)


def test_a_job_that_arrives_ends_it_and_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = threading.Event()

    def answer(should_stop: Any) -> None:
        running.set()
        while not should_stop():
            pass
        raise Interrupted

    setup = Setup(tmp_path, monkeypatch, answer)
    thread = threading.Thread(target=setup.helper.help_one)
    thread.start()
    assert running.wait(10)
    with setup.spare.jobs_first():
        assert setup.service.told == ["give_back"]
        assert not setup.helper.help_one(), "nobody is helped beside a job"
    thread.join()
    assert setup.told.outcomes == ["given_back"]


@pytest.mark.parametrize(
    ("error", "told", "again", "outcome"),
    [
        (None, ["end"], True, "answered"),
        (model_failure("invalid_graph", "a cycle"), ["end"], True, "answered"),
        (infrastructure_failure("io_error", "the disk"), ["give_back"], False, "failed"),
        (LeaseLost("job_1"), [], True, "lost"),
        (ValueError("what another worker wrote"), ["give_back"], False, "failed"),
    ],
)
def test_how_it_ends(
    error: Exception | None,
    told: list[str],
    again: bool,
    outcome: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(_: Any) -> None:
        if error is not None:
            raise error

    setup = Setup(tmp_path, monkeypatch, answer)
    assert setup.helper.help_one() is again
    assert setup.service.told == told
    assert setup.told.outcomes == [outcome]
    assert not setup.helper.help_one(), "there is no other"


def test_a_database_that_is_away_leaves_the_rest_to_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(_: Any) -> None:
        raise OperationalError("UPDATE", {}, Exception("away"))

    setup = Setup(tmp_path, monkeypatch, answer)
    with pytest.raises(OperationalError):
        setup.helper.help_one()
    assert not setup.service.told
    with setup.spare.turn() as mine:
        assert mine, "its turn is over"


def test_what_is_taken_back_ends_within_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(should_stop: Any) -> None:
        setup.service.holds = False
        assert setup.interrupted.wait(10), "the stage that runs is ended"
        assert should_stop()
        raise Interrupted

    setup = Setup(tmp_path, monkeypatch, answer)
    assert setup.helper.help_one()
    assert setup.service.told == []
    assert setup.told.outcomes == ["lost"]


def test_a_worker_that_is_drained_helps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(tmp_path, monkeypatch, lambda _: None)
    setup.willing = False
    assert not setup.helper.help_one()
    setup.willing = True
    assert setup.helper.help_one()


def test_a_stage_waits_for_who_computes_it_and_tells_when_the_machine_is_not_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_LOOK_S", 0.0)
    service, stop = Service(), threading.Event()
    anything: Any = service
    stages = module._Stages(anything, HOLD, Watch(), stop.is_set)
    assert not stages.elsewhere("k1", 1.0)
    service.busy = [True, True]
    assert stages.elsewhere("k2", 1.0)
    with stages.stage(StageSeen("build")):
        stages.waiting()
        with stages.held(alone=False):
            pass
        with stages.held(alone=False):
            pass
    assert service.told == ["doing k1", "doing k2", "waits", "doing k2"]
    service.busy = [True] * 5
    stop.set()
    with pytest.raises(Interrupted):
        stages.elsewhere("k3", 1.0)


def test_spare_time_is_looked_at_when_somebody_rings() -> None:
    shutdown, looked = threading.Event(), threading.Event()
    spare = SpareTime(shutdown)

    def errand() -> bool:
        looked.set()
        return False

    thread = threading.Thread(target=spare.run, args=([errand], 60.0))
    thread.start()
    spare.look()
    assert looked.wait(10)
    shutdown.set()
    spare.look()
    thread.join(10)
    assert not thread.is_alive()


def test_workers_are_of_one_kind_by_all_that_their_keys_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    hardware = describe()
    backends = offer.backends_of(hardware)
    mine = kind_of(backends, hardware, fingerprint(hardware), "key")
    assert mine == kind_of(backends, hardware, fingerprint(hardware), "key")
    assert kind_of(backends, hardware, "another machine", "key").plain != mine.plain
    other = kind_of(backends, hardware, fingerprint(hardware), "another key")
    assert (other.plain == mine.plain, other.signed == mine.signed) == (True, False)
    assert kind_of(backends[:-1], hardware, fingerprint(hardware), "key").plain != mine.plain
    monkeypatch.setattr("workers.kinds.installed_versions", lambda names: dict.fromkeys(names, "1"))
    assert kind_of(backends, hardware, fingerprint(hardware), "key").plain != mine.plain


def test_native_code_is_made_for_who_has_the_same_key() -> None:
    from workers.candidates import Candidate

    kind = Kind("plain", "signed")
    made = [Candidate("c", "c", backend, "fp32", ()) for backend in ("onnxruntime", "inductor")]
    assert [kind.of([c]) for c in made] == ["plain", "signed"]
    assert Call.from_json(Call(Make(Subject(made[0]), 1.0), 0.0).to_json()).request.subject.id == "c"  # type: ignore[union-attr]
