"""How the demo shows progress and the report in a terminal. Fields the service leaves out are shown as a dash."""

from __future__ import annotations

import math
import os
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from anneal_client import Event

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
ENDED = {"succeeded": ("✓", "green"), "cached": ("✓", "green"), "failed": ("✗", "red"), "skipped": ("–", "dim")}


class Screen:
    """Where lines go. Colours and the live line only on a terminal (and not with NO_COLOR set or TERM=dumb)."""

    def __init__(self) -> None:
        # A terminal that cannot show a character shows "?" instead of ending the demo.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # stdout is a TextIOWrapper here
        dumb = os.environ.get("TERM") == "dumb"
        self.live = sys.stdout.isatty() and not dumb
        self.colour = self.live and "NO_COLOR" not in os.environ
        self.width = max(60, min(140, shutil.get_terminal_size((110, 24)).columns))
        self._pending = False

    def paint(self, text: str, *styles: str) -> str:
        if not self.colour or not styles:
            return text
        return f"\033[{';'.join(COLOURS[s] for s in styles)}m{text}\033[0m"

    def line(self, text: str = "") -> None:
        """A line that stays."""
        if self._pending:
            sys.stdout.write("\r\033[K")
            self._pending = False
        print(text, flush=True)

    def now(self, text: str) -> None:
        """A line that the next one replaces; nothing where the output is not a terminal."""
        if self.live:
            sys.stdout.write(f"\r\033[K{text[: self.width - 1]}")
            sys.stdout.flush()
            self._pending = True

    def title(self, text: str) -> None:
        self.line()
        self.line(self.paint(text, "bold"))

    def bullet(self, text: str, mark: str = "•") -> None:
        for i, part in enumerate(textwrap.wrap(clean(text), self.width - 4) or [""]):
            self.line(f"  {mark if i == 0 else ' '} {part}")


def clean(value: Any) -> str:
    """Text from the service, without control characters that a terminal would obey."""
    return "".join(" " if unicodedata.category(c) == "Cc" else c for c in str(value))


class Progress:
    """Prints a job's events: a line for every stage that ended, the running stage on the live line."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._started: dict[str, float] = {}
        self._begin = time.monotonic()

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.type == "stage":
            self._stage(data)
        elif event.type == "progress":
            self._screen.now(f"  … {self._label(data)} {self._percent(data)} {clean(data.get('message') or '')}")
        elif event.type == "note":
            self._screen.bullet(str(data.get("message", "")), "i")
        elif event.type == "state" and data.get("status"):
            elapsed = self._screen.paint(f"{time.monotonic() - self._begin:6.1f} s", "dim")
            self._screen.line(f"  {elapsed}  job {clean(data['status'])}")

    def _stage(self, data: Mapping[str, Any]) -> None:
        label, status = self._label(data), str(data.get("status"))
        if status not in ENDED:
            self._started.setdefault(label, time.monotonic())
            self._screen.now(f"  … {label}")
            return
        mark, colour = ENDED[status]
        now = time.monotonic()
        took = data.get("seconds")
        if not isinstance(took, int | float):
            took = now - self._started.get(label, now)
        extra = "from cache" if status == "cached" or data.get("cached") else f"{took:.1f} s"
        if status == "failed":
            extra = clean(data.get("message") or "failed")
        elapsed = self._screen.paint(f"{now - self._begin:6.1f} s", "dim")
        self._screen.line(
            f"  {elapsed}  {self._screen.paint(mark, colour)} {label:<34} {self._screen.paint(extra, 'dim')}"
        )

    @staticmethod
    def _label(data: Mapping[str, Any]) -> str:
        name = clean(data.get("stage") or "job")
        return f"{name} · {clean(data['candidate'])}" if data.get("candidate") else name

    @staticmethod
    def _percent(data: Mapping[str, Any]) -> str:
        value = data.get("progress")
        return f"{100 * value:3.0f} %" if isinstance(value, int | float) else ""


def number(value: Any, digits: int = 3, unit: str = "") -> str:
    """A figure with so many significant digits; a dash where it was not measured."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if value == 0:
        return f"0{unit}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 6)}f}{unit}"


def table(
    screen: Screen, head: Sequence[str], rows: Sequence[Sequence[str]], styles: Sequence[Sequence[str]] = ()
) -> None:
    """Columns as wide as their content: the first column and the last to the left, figures to the right."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    last = len(head) - 1

    def joined(cells: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i in (0, last) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    screen.line("  " + screen.paint(joined(head).rstrip(), "dim"))
    screen.line("  " + screen.paint("─" * (sum(widths) + 2 * last), "dim"))
    for i, row in enumerate(rows):
        screen.line("  " + screen.paint(joined(row).rstrip(), *(styles[i] if i < len(styles) else ())))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _rows(value: Any) -> list[Mapping[str, Any]]:
    """A list of objects, from a list or from an object of named objects."""
    if isinstance(value, Mapping):
        return [{"name": name, **_mapping(entry)} for name, entry in value.items()]
    return [entry for entry in value or () if isinstance(entry, Mapping)]


def interval(value: Any) -> str:
    """A speed-up with its interval: an object with `ratio` (or `speedup`), `low` and `high`, or a bare number."""
    if not isinstance(value, Mapping):
        return number(value, 3, "x")
    text = number(value.get("ratio", value.get("speedup")), 3, "x")
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} [{number(value['low'], 3)}, {number(value['high'], 3)}]"


def shipped_speedups(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Batch size → {ratio, low, high} of what ships; nothing where that is the original."""
    shipped = next((c for c in _rows(report.get("candidates")) if c.get("id") == report.get("picked")), {})
    found = {size: _mapping(at).get("speedup") for size, at in _mapping(shipped.get("batches")).items()}
    return {size: ratio for size, ratio in found.items() if isinstance(ratio, Mapping)}


def _batches(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    sizes = {str(size) for entry in entries for size in _mapping(entry.get("batches"))}
    return sorted(sizes, key=lambda s: (len(s), s))


def show_report(screen: Screen, report: Mapping[str, Any]) -> None:
    """The report as tables: analysis, candidates, checks, impacts, recommendations."""
    analysis, final = _mapping(report.get("analysis")), _mapping(report.get("final_metrics"))
    deployment = _mapping(report.get("deployment_config"))
    screen.title(
        f"Report: {clean(analysis.get('model', 'model'))} on {clean(analysis.get('hardware', 'this machine'))}"
    )
    _candidates(screen, report)
    for warning in report.get("warnings") or ():
        screen.line(f"  {screen.paint(clean(warning), 'bold', 'red')}")
    screen.title("The pick")
    qps = number(final.get("throughput_qps"), 4, "/s")
    before = number(analysis.get("original_latency_ms"), 3, " ms")
    screen.line(
        f"  {screen.paint(clean(final.get('speedup', '–')), 'bold', 'green')} as fast as the original: "
        f"p50 {number(final.get('latency_ms'), 3, ' ms')} (was {before}), "
        f"{qps}, {clean(deployment.get('precision', '–'))}, "
        f"accuracy loss {number(final.get('accuracy_loss_percent'), 2, ' points')} "
        f"({clean(final.get('accuracy_verdict') or 'unproven')}), "
        f"memory {number(final.get('memory_mb'), 3, ' MB')}"
    )
    _checks(screen, report)
    _applied(screen, report)
    advice = report.get("recommendations")
    if isinstance(advice, list) and advice:
        screen.title("Recommendations")
        for text in advice:
            screen.bullet(str(_mapping(text).get("text", text)))


def _applied(screen: Screen, report: Mapping[str, Any]) -> None:
    applied = _rows(report.get("optimizations_applied"))
    if not applied:
        return
    screen.title("What was done, and what it brought")
    rows = [(clean(entry.get("name", "–")), clean(entry.get("impact") or "–")) for entry in applied]
    table(screen, ("Optimization", "Impact"), rows)
    for entry in applied:
        if not entry.get("impact") and entry.get("reason"):
            screen.bullet(f"{entry.get('name', '–')}: {entry['reason']}")


def _candidates(screen: Screen, report: Mapping[str, Any]) -> None:
    candidates = _rows(report.get("candidates"))
    baseline = _mapping(report.get("baseline"))
    entries = [baseline, *candidates] if baseline else candidates
    sizes = _batches(entries)
    head = ["Candidate", "Precision", *(f"p50 b={s}" for s in sizes), *(f"Speed-up b={s} [95 %]" for s in sizes)]
    head += ["Loss", "Size", "Verdict"]
    rows, styles = [], []
    for entry in entries:
        original = entry is baseline
        shipped = report.get("picked") is not None and report.get("picked") == entry.get("id")
        batches = _mapping(entry.get("batches"))
        per_size = [_mapping(batches.get(s)) for s in sizes]
        accuracy = _mapping(entry.get("accuracy"))
        status = "picked" if shipped else ("original" if original else clean(entry.get("status", "–")))
        name = "original" if original else clean(entry.get("name") or entry.get("id") or "–")
        rows.append(
            [
                name,
                clean(entry.get("precision") or ("fp32" if original else "–")),
                *(number(b.get("p50_ms"), 3, " ms") for b in per_size),
                *("1x" if original else interval(b.get("speedup")) for b in per_size),
                "–" if original else number(accuracy.get("loss_percent"), 2),
                number(entry.get("size_mb"), 3, " MB"),
                status,
            ]
        )
        styles.append({"picked": ("bold", "green"), "dropped": ("dim",)}.get(status, ()))
    if rows:
        table(screen, head, rows, styles)
    for entry in candidates:
        if entry.get("reason"):
            screen.bullet(f"{entry.get('name') or entry.get('id')}: {entry['reason']}")
    for entry in _rows(report.get("skipped")):
        screen.bullet(f"not tried: {entry.get('name', '–')}, because {entry.get('reason', 'no reason was given')}")
    if report.get("budget_exhausted"):
        screen.bullet("The time budget ran out; this is the best so far.", "!")


def _checks(screen: Screen, report: Mapping[str, Any]) -> None:
    checks = _rows(report.get("checks"))
    if not checks:
        return
    screen.title("Checks")
    rows, styles = [], []
    for check in checks:
        passed = check.get("passed")
        word = "passed" if passed else ("not checked" if passed is None else "FAILED")
        shown = [check.get(k) for k in ("value", "limit")]
        cells = [number(v, 3) if isinstance(v, float) else ("–" if v is None else clean(v)) for v in shown]
        rows.append([clean(check.get("name", "–")), *cells, word])
        styles.append(("green",) if passed else (("dim",) if passed is None else ("red",)))
    table(screen, ("Check", "Value", "Limit", "Verdict"), rows, styles)
