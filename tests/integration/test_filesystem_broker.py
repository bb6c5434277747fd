"""The embedded default's broker under many senders and takers: every message arrives once, whole, in spite of junk."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from queue import Empty

from app.queue.broker import make_celery
from app.settings import Settings


def test_messages_arrive_once_and_whole(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    celery = make_celery(settings)
    (settings.broker_dir / "messages" / "000_junk.anneal.cpu.msg").write_bytes(b"")
    got: list[str] = []
    done = threading.Event()

    def take() -> None:
        with celery.connection_for_read() as connection, connection.channel() as channel:
            while not done.is_set() or list((settings.broker_dir / "messages").glob("*.msg")):
                try:
                    got.append(channel._get("anneal.cpu")["n"])
                except Empty:
                    time.sleep(0.001)

    def send(start: int) -> None:
        with celery.connection_for_write() as connection, connection.channel() as channel:
            for n in range(start, start + 200):
                channel._put("anneal.cpu", {"n": n, "padding": "x" * 20_000})

    takers = [threading.Thread(target=take) for _ in range(3)]
    senders = [threading.Thread(target=send, args=(i * 200,)) for i in range(3)]
    for thread in (*takers, *senders):
        thread.start()
    for thread in senders:
        thread.join()
    done.set()
    for thread in takers:
        thread.join()
    assert sorted(got) == [*range(600)]
    assert [*(settings.broker_dir / "messages").iterdir()] == []
