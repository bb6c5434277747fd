"""PostgreSQL connections that give up on a server which says nothing.

The server's own time-outs need a server that runs: one that hangs (stopped, its disk gone, its machine behind a dead
network) keeps its connections open and answers nothing. libpq has a time-out for connecting only.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import Dialect

from app.db.clock import CLOCK

RV = TypeVar("RV")

_LOOK_S = 0.1
_STATEMENT_S = 60.0
_LOCK_S = 20.0
_CONNECT_S = 10.0
_LEAST_CONNECT_S = 2.0  # libpq's own
_TRUSTED_S = 1.0  # after its last word, a connection is not asked again whether it is there


def make_postgres_engine(url: str, silence_s: float, **arguments: Any) -> Engine:
    """`silence_s`: how long a server may say nothing in mid-query before the connection is given up for lost
    (`OperationalError`); connecting, a statement and waiting for a lock take no longer either."""
    engine = create_engine(
        url,
        connect_args={
            "connect_timeout": max(_LEAST_CONNECT_S, min(_CONNECT_S, silence_s)),
            "options": f"-c statement_timeout={_ms(_STATEMENT_S, silence_s)} -c lock_timeout={_ms(_LOCK_S, silence_s)}",
        },
        **arguments,
    )

    _ask_seldom(engine.dialect)

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Dialect, _record: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Connection:
        connection = _Connection.connect(*args, **kwargs)
        connection.silence_s = silence_s
        return connection

    @event.listens_for(engine, "checkout")
    def _checkout(connection: Any, _record: Any, _proxy: Any) -> None:
        if CLOCK.due():
            _ask_the_time(connection)

    return engine


def _ask_seldom(dialect: Dialect) -> None:
    """Whether a connection is still there is asked where it was silent for a while, or was closed: a job's worker goes
    to the database so often that a trip more for each time is a third of all."""
    ping = dialect.do_ping

    def do_ping(dbapi_connection: Any) -> bool:
        return bool(dbapi_connection.surely_there() or ping(dbapi_connection))

    vars(dialect)["do_ping"] = do_ping  # there is no event for it


def _ask_the_time(connection: psycopg.Connection[Any]) -> None:
    """Of the database's machine. A connection that fails at it says so to who uses it next."""
    with suppress(psycopg.Error):
        connection.autocommit = True  # one round trip instead of three
        try:
            asked = CLOCK.reading()
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            if row is not None:
                CLOCK.learn(row[0], asked, CLOCK.reading())
        finally:
            connection.autocommit = False


def _ms(seconds: float, silence_s: float) -> int:
    # Below the silence: a server that is there, but late, says so itself before the connection is given up.
    return int(1000 * min(seconds, 0.8 * silence_s))


class _Connection(psycopg.Connection[Any]):
    silence_s = _STATEMENT_S
    heard = -math.inf  # when the server spoke last, by the monotonic clock

    def surely_there(self) -> bool:
        """Whether the server spoke a moment ago, and has not hung up since: that would be there to be read."""
        if self.closed or time.monotonic() - self.heard > _TRUSTED_S:
            return False
        unread = select.poll()
        unread.register(self.fileno(), select.POLLIN)
        return not unread.poll(0)

    def wait(self, gen: Any, interval: float = _LOOK_S, timeout: float | None = None) -> Any:
        return super().wait(self._while_it_speaks(gen), interval, timeout)

    def _while_it_speaks(self, gen: Generator[Any, Any, RV]) -> Generator[Any, Any, RV]:
        """What psycopg waits for, told every `interval` that nothing came."""
        try:
            state = next(gen)
            heard = time.monotonic()
            while True:
                ready = yield state
                if ready:
                    heard = self.heard = time.monotonic()
                elif time.monotonic() - heard > self.silence_s:
                    self.pgconn.finish()  # in an unknown state: the pool is to drop it
                    raise psycopg.OperationalError(f"the database said nothing for {self.silence_s:.1f} s")
                state = gen.send(ready)
        except StopIteration as end:
            found: RV = end.value
            return found
