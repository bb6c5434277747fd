"""The servers of the tests themselves: they work, and nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psycopg
import pytest
import redis

from tests import servers

# Starts one server and is then killed before it can stop it.
_ABANDON = """
import sys, time
from tests import servers
with getattr(servers, sys.argv[1])() as url:
    print(url, flush=True)
    time.sleep(60)
"""


def test_a_database_of_its_own(fresh_postgres: str, postgres_url: str) -> None:
    with psycopg.connect(fresh_postgres) as connection:
        connection.execute("CREATE TABLE t (x int)")
    with servers.new_database(postgres_url) as other, psycopg.connect(other) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE tablename = 't'").fetchone() == (0,)
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(other)


def test_redis_is_empty(fresh_redis: str) -> None:
    with redis.Redis.from_url(fresh_redis) as client:
        assert client.dbsize() == 0
        client.set("a", 1)


def test_a_server_that_does_not_start_says_why() -> None:
    with servers.temporary_folder("broken") as folder:
        command = [sys.executable, "-c", "print('no room'); raise SystemExit(3)"]
        server = servers.running(command, log=folder / "log", ready=lambda: False)
        with pytest.raises(servers.ServerFailed, match=r"exited with 3:\nno room"):
            server.__enter__()


@pytest.mark.parametrize("server", ["postgres", "redis_server"])
def test_a_server_dies_with_the_process_that_started_it(server: str) -> None:
    with servers.temporary_folder("abandoned") as folder:
        folder.chmod(0o755)  # PostgreSQL may run as another user
        command = [sys.executable, "-c", _ABANDON, server]
        environment = {**os.environ, "TMPDIR": str(folder)}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
            assert owner.stdout is not None
            port = int(owner.stdout.readline().rpartition(":")[2].partition("/")[0])
            assert servers.answers(port)
            os.kill(owner.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while servers.answers(port):
            assert time.monotonic() < deadline, "the server outlived its owner"
            time.sleep(0.02)
