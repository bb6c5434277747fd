"""The thread of a worker that answers which backends take a model: a job goes first, failures stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.compatibility.service import Question
from app.domain.failures import StageFailure, infrastructure_failure, model_failure
from app.settings import Settings
from workers import examiner as module
from workers.equipment import Equipment
from workers.examiner import Examiner
from workers.pipeline.isolated import Interrupted
from workers.spare import SpareTime

MODEL = SimpleNamespace(id="mdl_1", tenant_id="tnt", format="onnx", filename="m.onnx", sha256="0" * 64, size_bytes=1)


class Service:
    """What a worker asks and tells, in order."""

    def __init__(self, backends: tuple[str, ...] = ("a", "b")) -> None:
        self.told: list[tuple[str, Any]] = []
        self.holds = True
        self._question: Question | None = Question(cast("Any", MODEL), backends, "me")

    def take(self, *_: Any) -> Question | None:
        taken, self._question = self._question, None
        return taken

    def renew(self, _: Question) -> bool:
        return self.holds

    def answer(self, _: Question, backend: str, told: Any) -> None:
        self.told.append(("answer", backend))

    def fail(self, _: Question, backends: Any, error: Any) -> None:
        self.told.append((error["code"], [*backends]))

    def retry_later(self, _: Question, backends: Any) -> None:
        self.told.append(("retry", [*backends]))

    def give_back(self, _: Question, backends: Any) -> None:
        self.told.append(("back", [*backends]))


def made(
    tmp_path: Path, service: Service, run: Callable[[str, Callable[[], bool]], Any], monkeypatch: pytest.MonkeyPatch
) -> Examiner:
    """`run`: a stage call, by its backend ("" for the export) and whether it is to stop."""

    class Isolated:
        def run(self, request: Any, *, on_progress: Any, should_stop: Callable[[], bool]) -> Any:
            return SimpleNamespace(data=run(request.options.get("backend", ""), should_stop))

    workspace = SimpleNamespace(fetch=lambda _: tmp_path, new_call=lambda _: tmp_path)
    monkeypatch.setattr(Equipment, "workspace", lambda *_: nullcontext(workspace))
    monkeypatch.setattr(module, "examined_by", lambda _: {"a": "1", "b": "1"})
    monkeypatch.setenv("WORKER_LOCK_DIR", str(tmp_path / "locks"))
    settings = Settings(home=tmp_path)
    anything: Any = service
    spare = SpareTime(threading.Event())
    isolated, hardware = cast("Any", Isolated()), {"memory_bytes": 9}
    return Examiner(anything, Equipment("me", settings, anything, anything, isolated, hardware, "f", b""), spare)


def test_a_job_that_arrives_ends_it_and_it_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service, running = Service(), threading.Event()

    def run(backend: str, should_stop: Callable[[], bool]) -> Any:
        if backend == "b":
            running.set()
            while not should_stop():
                pass
            raise Interrupted
        return {}

    examiner = made(tmp_path, service, run, monkeypatch)
    thread = threading.Thread(target=examiner.answer_one)
    thread.start()
    assert running.wait(10)
    with examiner._spare.jobs_first():
        assert service.told == [("answer", "a"), ("back", ["b"])], "what was answered stays"
        assert not examiner.answer_one(), "nothing is examined beside a job"
    thread.join()


def test_what_somebody_else_holds_by_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RENEW_S", 0.0)
    service = Service()
    service.holds = False

    def run(_: str, should_stop: Callable[[], bool]) -> Any:
        assert should_stop()
        raise Interrupted

    assert not made(tmp_path, service, run, monkeypatch).answer_one()
    assert service.told == []


@pytest.mark.parametrize(
    ("where", "failure", "told"),
    [
        ("a", model_failure("runtime_crashed", "it crashed"), [("runtime_crashed", ["a"]), ("answer", "b")]),
        ("", model_failure("invalid_graph", "a cycle"), [("invalid_graph", ["a", "b"])]),
        ("b", infrastructure_failure("io_error", "the disk"), [("answer", "a"), ("retry", ["b"])]),
    ],
)
def test_what_fails(
    where: str, failure: StageFailure, told: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(backend: str, _: Callable[[], bool]) -> Any:
        if backend == where:
            raise failure
        return {}

    service = Service()
    examiner = made(tmp_path, service, run, monkeypatch)
    assert examiner.answer_one() is (told[-1][0] != "retry")
    assert service.told == told
    assert not examiner.answer_one(), "there is no other question"
