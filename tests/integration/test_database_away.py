"""A database that hangs, restarts or is not there yet, and what a worker makes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from sqlalchemy import make_url, select, text
from sqlalchemy.exc import OperationalError

from app.blobs.content import ContentStore
from app.db.base import make_engine
from app.db.migrate import upgrade
from app.db.orm import Worker
from app.db.uow import Database, patiently
from app.jobs.ledger import JobLedger
from app.jobs.service import JobService
from app.settings import Settings, WorkerSettings
from app.storage.local import LocalStore
from tests.factories.deployment import deployment, gone
from tests.integration.conftest import Desk
from tests.servers import HOST, free_port
from workers.pipeline.isolated import Interrupted, IsolatedRunner
from workers.pipeline.lease import LeaseKeeper
from workers.pipeline.protocol import Limits, StageRequest

pytestmark = pytest.mark.timeout(200)


@contextlib.contextmanager
def hung(url: str) -> Iterator[None]:
    """The server and all its processes stopped: connections stay, and say nothing."""
    port = f"port={make_url(url).port}"
    found = psutil.process_iter(["name", "cmdline"])
    (server,) = [p for p in found if p.info["name"] == "postgres" and port in (p.info["cmdline"] or ())]
    server.suspend()  # first: it makes no further ones then
    processes = [*server.children(recursive=True), server]
    try:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def test_a_server_that_says_nothing_is_given_up_and_found_again(fresh_postgres: str) -> None:
    engine = make_engine(Settings(DATABASE_URL=fresh_postgres).database, silence_s=1)
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 1")) == 1
        with hung(fresh_postgres), pytest.raises(OperationalError, match="said nothing"):
            connection.scalar(text("SELECT 2"))
        assert connection.invalidated
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT 3")) == 3
        with pytest.raises(OperationalError, match="timeout"):  # a server that answers late is told to stop
            connection.scalar(text("SELECT pg_sleep(5)"))
    engine.dispose()


_PID = text("SELECT pg_backend_pid()")


def test_a_connection_that_was_hung_up_is_noticed_though_nobody_asks_it(fresh_postgres: str) -> None:
    """It spoke a moment ago, so it is not asked whether it is there: that it was closed is seen all the same."""
    db = Database(make_engine(Settings(DATABASE_URL=fresh_postgres).database))
    with db.read() as session:
        first = session.scalar(_PID)
    with psycopg.connect(fresh_postgres, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", [first])
        deadline = time.monotonic() + 10
        while other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [first]).fetchone():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with db.write() as uow:
        assert uow.session.scalar(_PID) != first
    db.close()


def test_a_read_is_in_no_transaction_and_a_write_in_one(fresh_postgres: str) -> None:
    db = Database(make_engine(Settings(DATABASE_URL=fresh_postgres).database))
    number = text("SELECT txid_current()")
    for _ in range(2):  # by the same connection
        with db.read() as session:
            assert session.scalar(number) != session.scalar(number)
        with db.write() as uow:
            assert uow.session.scalar(number) == uow.session.scalar(number)
    db.close()


@pytest.mark.parametrize("kind", ["read", "write"])
def test_what_comes_back_after_the_end_is_closed(fresh_postgres: str, kind: str) -> None:
    """A thread whose task was cancelled still asks when the database is closed: no connection of it stays."""
    db = Database(make_engine(Settings(DATABASE_URL=fresh_postgres).database))
    with contextlib.ExitStack() as later:
        taken = later.enter_context(db.read() if kind == "read" else db.write())
        session = getattr(taken, "session", taken)
        number = session.scalar(_PID)
        held = session.connection().connection.dbapi_connection
        db.close()
        assert session.scalar(_PID) == number, "what is asked is answered"
    assert held.closed
    with psycopg.connect(fresh_postgres, autocommit=True) as other:
        deadline = time.monotonic() + 10
        while other.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", [number]).fetchone():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_write_waits_for_a_server_that_ends_all_connections(fresh_postgres: str) -> None:
    engine = make_engine(Settings(DATABASE_URL=fresh_postgres).database)
    db = Database(engine)
    tries: list[int] = []

    def write() -> int:
        with db.write() as uow:
            uow.session.execute(text("SELECT 1"))
            tries.append(1)
            if len(tries) == 1:
                uow.session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))
            return len(tries)

    assert patiently(write, 20) == 2
    with pytest.raises(OperationalError):
        patiently(lambda: tries.clear() or write(), 0)
    db.close()


def test_a_stage_ends_with_its_lease_while_the_database_hangs(fresh_postgres: str, tmp_path: Path) -> None:
    """Renewals and the job's own thread, which writes progress, both hang: the stage ends all the same."""
    url = Settings(DATABASE_URL=fresh_postgres).database
    upgrade(url)
    settings = WorkerSettings(lease_s=4)
    content, dispatch = ContentStore(LocalStore(tmp_path / "blobs")), lambda _: True
    ledger, renewals = (JobLedger(Database(make_engine(url, s)), content, dispatch, settings) for s in (4, 4 / 3))
    service = JobService(ledger.db, content, dispatch, Settings(home=tmp_path))
    desk = Desk(ledger.db, service, ledger, content, tmp_path)
    job = desk.submit()
    isolated = IsolatedRunner(["tests.factories.stages"])
    isolated.start()
    (tmp_path / "work").mkdir()
    folders = {"workspace": str(tmp_path / "work"), "outputs": str(tmp_path / "out")}
    limits = Limits(100, 4 << 30, 8 << 20)
    request = StageRequest("misbehave", {"how": "tell"}, {}, hardware={}, limits=limits, **folders)
    ends: list[BaseException] = []

    def work() -> None:
        asked = time.monotonic()
        claim = desk.claim(job)
        assert claim is not None
        with LeaseKeeper(renewals, claim, threading.Event(), asked=asked, on_lost=isolated.interrupt) as keeper:
            try:
                isolated.run(
                    request,
                    on_progress=lambda done, _: ledger.progress(claim, {"progress": done}, "progress", {}),
                    should_stop=keeper.should_stop,
                )
            except BaseException as error:
                ends.append(error)

    def stages() -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.name() == "anneal-stage"]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not service.get(job.tenant_id, job.id).progress:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (stage,) = stages()
        with hung(fresh_postgres):
            assert gone([stage], timeout_s=4 + 3), "the lease was over long ago"
            thread.join(timeout=20)
            assert not thread.is_alive(), "nothing waits for ever"
        assert isinstance(ends[0], Interrupted | OperationalError)
        assert not stages()
        ledger.sweep()
        assert service.get(job.tenant_id, job.id).status == "queued"
    finally:
        isolated.close()
        thread.join()
        for db in (ledger.db, renewals.db):
            db.close()


@contextlib.contextmanager
def forwarded(port: int, target: int) -> Iterator[None]:
    """Connections to `port` go on to `target`."""
    ends: list[socket.socket] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((HOST, target))
                ends.extend((near, far))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    with socket.create_server((HOST, port)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for end in ends:
                end.close()


def test_a_worker_waits_for_a_database_that_is_not_there_yet(fresh_postgres: str, tmp_path: Path) -> None:
    """First nobody listens, then the schema is missing."""
    url, port = make_url(fresh_postgres), free_port()
    assert url.port is not None
    with deployment(tmp_path / "home") as deployed:
        deployed.environment["DATABASE_URL"] = url.set(port=port).render_as_string(hide_password=False)
        worker = deployed.start_worker()
        deployed.wait_for(lambda: deployed.worker_log().count("waiting_for_the_database") >= 2)
        assert worker.poll() is None
        engine = make_engine(Settings(DATABASE_URL=fresh_postgres).database)
        try:
            with forwarded(port, url.port):
                deployed.wait_for(lambda: "UndefinedTable" in deployed.worker_log())
                upgrade(Settings(DATABASE_URL=fresh_postgres).database)

                def signed_on() -> bool:
                    with engine.connect() as connection:
                        return connection.scalar(select(Worker.id)) is not None

                deployed.wait_for(signed_on)
        finally:
            engine.dispose()


def test_the_pause_between_tries_is_short(tmp_path: Path) -> None:
    tries: list[float] = []

    def write() -> None:
        tries.append(time.monotonic())
        raise OperationalError("statement", {}, Exception("away"))

    with pytest.raises(OperationalError):
        patiently(write, 1.0)
    assert len(tries) >= 3
