"""What the operator's commands share: settings, the database, who acts, and how they answer."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any

from app.db.base import make_engine
from app.db.uow import Database
from app.settings import Settings


class Desk:
    """A context: the database is connected to on first use, and closed at the end. `json`: answers are documents, one a
    line; else columns for people."""

    def __init__(self, settings: Settings, *, json: bool = False) -> None:
        self.settings = settings
        self._json = json
        self._database: Database | None = None

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()

    @property
    def db(self) -> Database:
        if self._database is None:
            self._database = Database(make_engine(self.settings.database))
        return self._database

    @cached_property
    def actor(self) -> str:
        """Who acts, as audit rows have it."""
        try:
            return f"operator:{getpass.getuser()[:100]}"
        except (KeyError, OSError):  # a user without a name
            return "operator"

    def show(self, rows: Iterable[Mapping[str, Any]], empty: str = "None.") -> None:
        """Rows of the same fields."""
        rows = list(rows)
        if self._json:
            for row in rows:
                sys.stdout.write(json.dumps(dict(row), default=_plain) + "\n")
        elif not rows:
            self.say(empty)
        else:
            self._columns(rows)

    def say(self, text: str) -> None:
        """For people only, on stderr: stdout has what was asked for."""
        sys.stderr.write(text + "\n")

    complain = say

    def _columns(self, rows: list[Mapping[str, Any]]) -> None:
        names = list(rows[0])
        table = [[name.replace("_", " ") for name in names], *([_words(row[name]) for name in names] for row in rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        for line in table:
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            sys.stdout.write(text.rstrip() + "\n")


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return value.isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, dict | list):
        return json.dumps(value, default=_plain)
    # What a client named must not drive the operator's terminal.
    return "".join(c if c.isprintable() else "\ufffd" for c in str(value))


def _plain(value: Any) -> str:
    return value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else str(value)
