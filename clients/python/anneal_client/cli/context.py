"""What every command has: where it writes, which service it asks."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from anneal_client.cli import logins
from anneal_client.cli.screen import Screen, clean, cut
from anneal_client.cli.service import Service


@dataclass
class Context:
    """`json`: stdout gets one JSON document and nothing else. `url`: as given on the command line."""

    json: bool = False
    url: str | None = None
    quiet: bool = False
    screen: Screen = field(default_factory=Screen)
    _place: logins.Place | None = None

    @property
    def place(self) -> logins.Place:
        if self._place is None:
            self._place = logins.find(self.url)
        return self._place

    def service(self, *, patient: bool = False) -> Service:
        return Service(self.place, patient=patient)

    def say(self, text: str) -> None:
        """A line for a person; none with --json or --quiet. The text is clean."""
        if not self.json and not self.quiet:
            self.screen.line(text)

    def busy(self, text: str) -> None:
        """A line until the next one, on a terminal."""
        if not self.json and not self.quiet:
            self.screen.draw([f"  … {cut(clean(text), self.screen.width - 4)}"])

    def emit(self, document: Any) -> None:
        """The answer to --json."""
        self.screen.wipe()
        # In ASCII: a control character of eight bits gives orders to some terminals, too.
        json.dump(document, sys.stdout, indent=2, default=str)
        sys.stdout.write("\n")
        sys.stdout.flush()
