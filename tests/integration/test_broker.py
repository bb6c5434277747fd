"""Sending to the broker: a broker that is away, hangs or is full costs about a second, and is told by False."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest
import redis

from app.db.orm import Job
from app.queue.broker import make_celery
from app.queue.producer import check_broker, make_dispatch
from app.settings import Settings
from tests.servers import HOST, free_port

JOB = Job(id="job_1", queue="anneal.test")


@pytest.fixture(params=["refuses", "hangs"])
def port(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param == "refuses":
        yield free_port()
        return
    with socket.create_server((HOST, 0)) as server:  # accepts, in the kernel's queue, and never answers
        yield server.getsockname()[1]


def test_a_broker_that_is_away_costs_a_second_at_most(port: int) -> None:
    settings = Settings(BROKER_URL=f"redis://{HOST}:{port}/0")
    dispatch = make_dispatch(settings)
    for _ in range(2):
        started = time.monotonic()
        assert dispatch(JOB) is False
        assert time.monotonic() - started < 1.5
    started = time.monotonic()
    with pytest.raises(Exception, match=r"refused|Timeout"):
        check_broker(settings)
    assert time.monotonic() - started < 4


def test_sent_and_received(fresh_redis: str) -> None:
    dispatch = make_dispatch(Settings(BROKER_URL=fresh_redis))
    assert dispatch(JOB) is True
    with redis.Redis.from_url(fresh_redis) as client:
        # A restarted broker has closed the connections of everybody.
        client.client_kill_filter(_type="normal", skipme=True)
        assert [dispatch(JOB), dispatch(JOB)][-1] is True
        assert client.llen(JOB.queue) >= 2
        assert "job_1" in json.dumps(json.loads(client.lindex(JOB.queue, 0))["headers"])


def test_a_broker_that_refuses_the_message(fresh_redis: str) -> None:
    dispatch = make_dispatch(Settings(BROKER_URL=fresh_redis))
    with redis.Redis.from_url(fresh_redis) as client:
        client.config_set("maxmemory", 1)
        try:
            assert dispatch(JOB) is False
        finally:
            client.config_set("maxmemory", 0)
    assert dispatch(JOB) is True
    assert make_dispatch(Settings(BROKER_URL=fresh_redis.replace("redis://:", "redis://:wrong")))(JOB) is False


def test_the_embedded_broker(tmp_home: Settings) -> None:
    assert make_dispatch(tmp_home)(JOB) is True
    check_broker(tmp_home)


def test_a_worker_keeps_waiting_for_its_broker() -> None:
    conf = make_celery(Settings(BROKER_URL="redis://127.0.0.1:1/0")).conf
    assert "max_retries" not in conf.broker_transport_options
    assert conf.broker_connection_max_retries is None
    assert conf.broker_transport_options["socket_timeout"] == 30
