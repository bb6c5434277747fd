"""A job while it runs: what is tried, how fast it is, who leads. Drawn again on a terminal, line by line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anneal_client import Event
from anneal_client.cli import figures
from anneal_client.cli.screen import Screen, clean, cut

_BETWEEN_DRAWS_S = 0.1
_OUT = ("refused",)
_TOLD_PLAINLY = ("screened", "checked", "finalist", "refused")
_WORDS = {"proposed": "waits", "built": "built", "screened": "timed", "refused": "dropped"}


@dataclass
class Candidate:
    """One configuration, as the last event of it told."""

    id: str
    name: str
    standing: str = "proposed"
    speedup: Mapping[str, Any] | None = None
    loss: Any = None
    reason: str = ""

    @property
    def word(self) -> str:
        return _WORDS.get(self.standing, self.standing)


@dataclass
class State:
    """What is known of the job from its events."""

    status: str = "queued"
    stage: str = ""
    message: str = ""
    progress: float = 0.0
    expected_end: str | None = None
    candidates: dict[str, Candidate] = field(default_factory=dict)
    leader: str | None = None

    def take(self, event: Event) -> list[Candidate]:
        """Those candidates that stand elsewhere now."""
        data = event.data
        if figures.is_number(data.get("progress")):
            self.progress = max(self.progress, float(data["progress"]))
        if event.type == "state":
            self.status = str(data.get("status") or self.status)
        elif event.type in ("stage", "progress"):
            name = str(data.get("stage") or "")
            of = data.get("candidate") or data.get("hardware")
            self.stage = f"{name} · {of}" if of else name
            self.message = str(data.get("message") or "")
            self.expected_end = data.get("expected_end") or self.expected_end
        elif event.type == "candidates":
            self.leader = data.get("leader")
            return [self._candidate(told) for told in data.get("candidates") or () if isinstance(told, Mapping)]
        return []

    def _candidate(self, told: Mapping[str, Any]) -> Candidate:
        cid = str(told.get("candidate"))
        speed = told.get("speedup")
        self.candidates[cid] = Candidate(
            cid,
            str(told.get("name") or cid),
            str(told.get("standing") or "proposed"),
            speed if isinstance(speed, Mapping) else None,
            told.get("loss_percent"),
            str(told.get("reason") or ""),
        )
        return self.candidates[cid]


class Live:
    """Takes a job's events and shows them."""

    def __init__(self, screen: Screen, job_id: str) -> None:
        self._screen = screen
        self._job_id = job_id
        self._state = State()
        self._began = time.monotonic()
        self._drawn = 0.0
        self._led: str | None = None

    def __call__(self, event: Event) -> None:
        before = self._state.status
        moved = self._state.take(event)
        screen, state = self._screen, self._state
        if event.type == "note":
            screen.bullet(str(event.data.get("message", "")), "i", "dim")
        if not screen.live:
            self._plain(event, before, moved)
        elif event.terminal:
            screen.wipe()
        elif time.monotonic() - self._drawn >= _BETWEEN_DRAWS_S or event.type in ("state", "candidates"):
            self._drawn = time.monotonic()
            screen.draw(self.lines())
        if event.type == "state" and event.data.get("reason") and state.status == "queued":
            screen.bullet(f"back in the queue: {event.data['reason']}", "!", "yellow")

    def tick(self) -> None:
        """Time goes on, and nothing happens."""
        self._screen.draw(self.lines())

    def _plain(self, event: Event, before: str, moved: list[Candidate]) -> None:
        if event.type == "state" and (self._state.status != before or before == "queued"):
            self._say(self._state.status)
        for found in moved:
            if found.standing in _TOLD_PLAINLY:
                self._say(f"{found.name}: {self._told(found)}")
        if self._state.leader != self._led:
            self._led = self._state.leader
            if self._led is not None:
                self._say(f"leads: {self._name(self._led)}")

    def _say(self, text: str) -> None:
        self._screen.line(f"  {time.monotonic() - self._began:7.1f} s  {clean(text)}")

    @staticmethod
    def _told(found: Candidate) -> str:
        speed = f" {figures.speedup(found.speedup)}" if found.speedup else ""
        loss = f", loss {figures.percent(found.loss)}" if figures.is_number(found.loss) else ""
        reason = f" ({found.reason})" if found.reason else ""
        return f"{found.word}{speed}{loss}{reason}"

    def _name(self, cid: str) -> str:
        found = self._state.candidates.get(cid)
        return cid if found is None else found.name

    def lines(self) -> list[str]:
        """The block: how far the job is, and the candidates, the fastest first."""
        screen, state = self._screen, self._state
        elapsed = figures.duration(time.monotonic() - self._began)
        left = figures.between(time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), state.expected_end)
        about = f", about {figures.duration(left)} left" if left is not None and left > 0 else ""
        head = f"{state.status}  {figures.bar(state.progress)} {100 * state.progress:3.0f} %  {elapsed}{about}"
        doing = cut(clean(" ".join(filter(None, (state.stage, state.message)))), screen.width - 4)
        shown = [f"  {cut(head, screen.width - 2)}", f"  {screen.paint(doing, 'dim')}"]
        room = screen.height - 7
        ranked = sorted(state.candidates.values(), key=self._rank)
        if not ranked or room < 1:
            return shown
        rows, styles = [], []
        for found in ranked[:room]:
            leads = found.id == state.leader
            loss = figures.percent(found.loss) if figures.is_number(found.loss) else ""
            speed = figures.speedup(found.speedup) if found.speedup else ""
            rows.append([("▶ " if leads else "  ") + found.name, found.word, speed, loss])
            styles.append(("bold", "green") if leads else ("dim",) if found.standing in _OUT else ())
        head_row = (f"  {len(ranked)} tried", "", "Speed-up [95 %]", "Loss")
        return shown + screen.rendered(head_row, rows, left=(0, 1), styles=styles, fit=0)

    def _rank(self, found: Candidate) -> tuple[bool, bool, float]:
        ratio = (found.speedup or {}).get("ratio")
        fast = float(ratio or 0.0) if figures.is_number(ratio) else 0.0
        return found.id != self._state.leader, found.standing in _OUT, -fast
