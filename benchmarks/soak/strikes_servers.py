"""What happens to the servers: Redis flushed and away, PostgreSQL restarted in the middle of a job and of a commit, S3
away, slow, or answering with errors."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import redis

from benchmarks.soak.recoveries import Struck
from benchmarks.soak.strikes import LEASE_S, Field, Strike
from tests.cluster.cluster import Managed
from tests.factories.small_disk import full

_A_MINUTE_S = 60.0
_S3_S = 6.0
_FULL_S = 8.0

# At the very commit of whatever tells of a job, the server stands still for a moment.
_SLOW_COMMIT = """
CREATE OR REPLACE FUNCTION soak_slow() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_sleep(0.4); RETURN NULL; END $$;
DROP TRIGGER IF EXISTS soak_slow ON job_events;
CREATE CONSTRAINT TRIGGER soak_slow AFTER INSERT ON job_events DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION soak_slow();
"""
_AT_COMMIT = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND wait_event = 'PgSleep' AND upper(query) LIKE 'COMMIT%'
"""


class ServerStrikes:
    def __init__(self, field: Field) -> None:
        self.field = field

    def kinds(self) -> dict[str, Strike]:
        cluster = self.field.cluster
        return {
            "Redis flushed": self.flushed,
            "Redis restarted": lambda: self.redis_away(2.0),
            "Redis gone for a minute": lambda: self.redis_away(_A_MINUTE_S),
            "PostgreSQL restarted in mid-job": lambda: self.in_mid_job(signal.SIGINT),
            "PostgreSQL killed in mid-job": lambda: self.in_mid_job(signal.SIGQUIT),
            "PostgreSQL restarted in mid-commit": lambda: self.in_mid_commit(signal.SIGINT),
            "PostgreSQL killed in mid-commit": lambda: self.in_mid_commit(signal.SIGQUIT),
            "PostgreSQL hung": lambda: self.hung(cluster.postgres, 1.2 * LEASE_S),
            "S3 killed": self.s3_killed,
            "S3 hung": lambda: self.hung(cluster.s3, _S3_S),
            "S3 refusing connections": lambda: self.s3_misbehaves(refuses=True),
            "S3 slow": lambda: self.s3_misbehaves(slow_s=3.0),
            "S3 answering 500": lambda: self.s3_misbehaves(answer=500),
            "S3 answering 503": lambda: self.s3_misbehaves(answer=503),
            "PostgreSQL's disk full": lambda: self.disk_full("postgres", cluster.postgres),
            "S3's disk full": lambda: self.disk_full("s3", cluster.s3),
        }

    def _over(self, at: float) -> Struck:
        """Recovery counts from when the server is there again, and from how far the jobs were then."""
        return Struck(at, self.field.eyes.running(), same_worker=True, served=self.field.all_ready)

    def flushed(self) -> Struck:
        with redis.Redis.from_url(self.field.cluster.environment["BROKER_URL"], socket_timeout=5) as client:
            client.flushall()
        return self._over(time.monotonic())

    def redis_away(self, seconds: float) -> Struck:
        return self._over(self.field.restart(self.field.cluster.redis, seconds, signal.SIGKILL))

    def in_mid_job(self, how: signal.Signals) -> Struck | None:
        if self.field.eyes.wait_for(lambda found: found.stage is not None, 20) is None:
            return None
        return self._over(self.field.restart(self.field.cluster.postgres, 1.0, how))

    def in_mid_commit(self, how: signal.Signals) -> Struck | None:
        found = False
        with self._admin() as connection:
            connection.execute(_SLOW_COMMIT)
            deadline = time.monotonic() + 20
            while not found and time.monotonic() < deadline:
                row = connection.execute(_AT_COMMIT).fetchone()
                found = bool(row and row[0])
                time.sleep(0.002)
        try:
            return self._over(self.field.restart(self.field.cluster.postgres, 0.5, how)) if found else None
        finally:
            with self._admin() as connection:
                connection.execute("DROP TRIGGER IF EXISTS soak_slow ON job_events")

    @contextlib.contextmanager
    def _admin(self) -> Iterator[psycopg.Connection[Any]]:
        url = self.field.cluster.environment["DATABASE_URL"]
        with psycopg.connect(url, autocommit=True, connect_timeout=5) as connection:
            connection.execute("SET lock_timeout = '10s'")
            yield connection

    def hung(self, managed: Managed, seconds: float) -> Struck:
        with managed.stopped(seconds):
            pass
        return self._over(time.monotonic())

    def s3_killed(self) -> Struck:
        return self._over(self.field.restart(self.field.cluster.s3, 4.0, signal.SIGKILL))

    def disk_full(self, name: str, managed: Managed) -> Struck | None:
        """To the last byte, while a job runs. PostgreSQL may end itself: it is started again once there is room."""
        disk = self.field.cluster.disks.get(name)
        if disk is None or self.field.eyes.wait_for(lambda found: found.stage is not None, 20) is None:
            return None
        with full(disk):
            time.sleep(_FULL_S)
        if managed.down():
            return self._over(self.field.start_again(managed))
        return self._over(time.monotonic())

    def s3_misbehaves(self, **how: Any) -> Struck | None:
        """Until it has struck somebody, and for a while."""
        with self.field.gate.misbehaving(**how):
            time.sleep(_S3_S)
            deadline = time.monotonic() + 10
            while not self.field.gate.struck and time.monotonic() < deadline:
                time.sleep(0.05)
            struck = self.field.gate.struck
        return self._over(time.monotonic()) if struck else None
