"""What a wait can show: one line in a terminal, a line per step in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from anneal_client.events import Event


class Progress:
    """Give it as `on_event`: it tells on `file` (standard error) how far the job is. In a terminal that is one line
    that changes; elsewhere a line for each stage and state, without control characters."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stderr if file is None else file
        self._live = self._file.isatty()
        self._started = time.monotonic()
        self._share = 0.0
        self._stage = ""
        self._shown = 0

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.type == "progress":
            share = data.get("progress")
            self._share = share if isinstance(share, int | float) else self._share
            self._stage = str(data.get("stage") or self._stage)
            if self._live:
                self._show(self._line())
        elif event.type == "stage":
            self._stage = str(data.get("stage") or "")
            about = " ".join(str(data[n]) for n in ("candidate", "status") if data.get(n))
            self._show(f"{self._line()} {about}".rstrip())
        elif event.type == "state":
            if event.terminal:
                self._share = 1.0
            error = data.get("error")
            why = f": {error.get('detail')}" if isinstance(error, dict) else ""
            self._stage = ""
            self._show(f"{self._line()} {data.get('status')}{why}", last=event.terminal)

    def _line(self) -> str:
        return f"{100 * self._share:3.0f} % {time.monotonic() - self._started:5.0f} s {self._stage}".rstrip()

    def _show(self, line: str, *, last: bool = False) -> None:
        line = "".join(c if c.isprintable() else " " for c in line)
        if self._live:
            line = line[:100]
            self._file.write("\r" + line.ljust(self._shown) + ("\n" if last else ""))
            self._shown = len(line)
        else:
            self._file.write(line + "\n")
        self._file.flush()
