"""A broker that takes its time for every message: leases and heartbeats do not wait for it, and a thousand jobs that
wait are no reason for a thousand messages."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import select

from app.db.base import utcnow
from app.db.orm import LOCAL_TENANT, Job, Worker
from app.jobs.schedule import Offer
from app.settings import Settings, WorkerSettings
from tests.factories.webhooks import eventually
from tests.integration.conftest import Desk
from workers.service import WorkerService

JOBS = 1000


@contextlib.contextmanager
def delayed(target: int, seconds: float) -> Iterator[int]:
    """A way to a port of this machine on which whatever a client says takes so long; its port."""
    sockets: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def begin(call: Callable[..., None], *arguments: object) -> None:
        threads.append(threading.Thread(target=call, args=arguments, daemon=True))
        threads[-1].start()

    def pump(source: socket.socket, sink: socket.socket, pause_s: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                time.sleep(pause_s)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", target))
                sockets.extend((client, server))
                begin(pump, client, server, seconds)
                begin(pump, server, client, 0.0)

    sockets.append(socket.create_server(("127.0.0.1", 0)))
    begin(accept, sockets[0])
    try:
        yield int(sockets[0].getsockname()[1])
    finally:
        for end in [*sockets]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in [*threads]:
            thread.join()
        for end in sockets:
            end.close()


def test_a_thousand_jobs_hold_up_neither_heartbeats_nor_leases(
    desk: Desk, tmp_path: Path, fresh_redis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ANNEAL_HOME", "DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
    first = desk.submit()
    columns = {c.name: getattr(first, c.name) for c in Job.__table__.columns}
    with desk.db.write() as uow:
        uow.session.add_all(Job(**{**columns, "id": f"job_0{n:04d}"}) for n in range(JOBS))
    claim = desk.ledger.claim(Offer("a worker that died", (first.queue,)))
    assert claim is not None
    with desk.db.write() as uow:
        uow.session.get_one(Job, claim.job_id).lease_expires_at = utcnow() + timedelta(hours=1)

    def beat() -> float:
        with desk.db.read() as session:
            seen = session.scalar(select(Worker.last_seen_at))
        assert seen is not None
        return float(seen.timestamp())

    there = urlsplit(fresh_redis)
    assert there.port is not None
    with delayed(there.port, 0.2) as port, redis.Redis.from_url(fresh_redis) as client:
        settings = Settings(
            home=tmp_path / "worker",
            DATABASE_URL=desk.db.engine.url.render_as_string(hide_password=False),
            BROKER_URL=fresh_redis.replace(f":{there.port}", f":{port}"),
            worker=WorkerSettings(heartbeat_s=0.2, sweep_s=0.5),
        )
        worker = WorkerService(settings)
        worker.start()
        try:
            assert eventually(lambda: client.llen(first.queue) >= 2, 60), "it is idle, and wakes itself"
            with desk.db.write() as uow:
                uow.session.get_one(Job, claim.job_id).lease_expires_at = utcnow() - timedelta(seconds=1)
            before = beat()
            assert eventually(lambda: desk.service.get(LOCAL_TENANT, claim.job_id).status == "queued")
            assert eventually(lambda: beat() > before + 0.5)
            assert client.llen(first.queue) < JOBS / 10, "one message a sweep"
        finally:
            worker.close()
