"""Where text goes: lines, tables, and a block of lines that is drawn again while something runs.

Escape codes are written to terminals only, colours not with NO_COLOR set (https://no-color.org) or TERM=dumb. Whatever
comes from a service or a file passes `clean` first: a name cannot give orders to a terminal.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
_CI = ("CI", "GITHUB_ACTIONS", "GITLAB_CI", "BUILD_ID")  # a terminal there is a log, if there is one


def clean(value: Any) -> str:
    """One line of text that a terminal shows as it is: control characters, and those that turn the direction of
    writing, are spelled out."""
    return "".join(_shown(c) for c in str(value))


def _shown(char: str) -> str:
    if char.isprintable():
        return char
    if char == "\t" or unicodedata.category(char) == "Zs":
        return " "
    return char.encode("unicode_escape").decode("ascii")


def width(text: str) -> int:
    """Columns that it takes in a terminal."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, columns: int) -> str:
    """At most so many columns, with an ellipsis where something is cut off."""
    if width(text) <= columns:
        return text
    kept, used = [], 0
    for char in text:
        used += width(char)
        if used > columns - 1:
            break
        kept.append(char)
    return "".join(kept) + "…"


def padded(text: str, columns: int, *, right: bool = False) -> str:
    gap = " " * max(0, columns - width(text))
    return gap + text if right else text + gap


class Screen:
    """`live`: whether a block can be drawn again; `colour`: whether there are colours."""

    def __init__(self, out: TextIO | None = None, environment: Mapping[str, str] | None = None) -> None:
        self.out = out or sys.stdout
        env = os.environ if environment is None else environment
        if hasattr(self.out, "reconfigure"):
            self.out.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
        terminal = self.out.isatty() and env.get("TERM") != "dumb"
        self.live = terminal and not any(env.get(name) for name in _CI)
        self.colour = terminal and not env.get("NO_COLOR")
        size = shutil.get_terminal_size((110, 24))
        self.width = max(40, min(160, size.columns)) if terminal else 110
        self.height = max(8, size.lines)
        self._drawn = 0

    def paint(self, text: str, *styles: str) -> str:
        if not self.colour or not styles:
            return text
        return f"\033[{';'.join(_COLOURS[s] for s in styles)}m{text}\033[0m"

    def line(self, text: str = "") -> None:
        """A line that stays."""
        self.wipe()
        self.out.write(text + "\n")
        self.out.flush()

    def title(self, text: str) -> None:
        self.line()
        self.line(self.paint(clean(text), "bold"))

    def bullet(self, text: str, mark: str = "•", *styles: str) -> None:
        for i, part in enumerate(textwrap.wrap(clean(text), self.width - 4) or [""]):
            self.line(f"  {self.paint(mark if i == 0 else ' ', *styles)} {part}")

    def draw(self, lines: Sequence[str]) -> None:
        """The block, in place of the one before; nothing where the output is not a terminal. Lines must fit."""
        if not self.live:
            return
        self.wipe()
        shown = list(lines)[: self.height - 2]
        self.out.write("".join(line + "\n" for line in shown))
        self.out.flush()
        self._drawn = len(shown)

    def wipe(self) -> None:
        """The block is gone."""
        if self._drawn:
            self.out.write(f"\033[{self._drawn}A\r\033[J")
            self._drawn = 0

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: Sequence[int] = (0,),
        styles: Sequence[Sequence[str]] = (),
        fit: int | None = None,
    ) -> None:
        for line in self.rendered(head, rows, left=left, styles=styles, fit=fit):
            self.line(line)

    def rendered(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        left: Sequence[int] = (0,),
        styles: Sequence[Sequence[str]] = (),
        fit: int | None = None,
    ) -> list[str]:
        """Columns as wide as their content; those in `left` to the left, figures to the right. `fit`: the column that
        is cut where the screen is too narrow (on a terminal; elsewhere nothing is lost)."""
        cells = [[clean(cell) for cell in row] for row in rows]
        widths = [max(map(width, column)) for column in zip(head, *cells, strict=True)]
        beyond = sum(widths) + 2 * len(widths) - self.width
        if fit is not None and beyond > 0 and self.out.isatty():
            widths[fit] = max(min(12, widths[fit]), widths[fit] - beyond)
        lines = [self.paint(self._row(head, widths, left), "dim")]
        lines.append(self.paint("─" * (sum(widths) + 2 * (len(widths) - 1)), "dim"))
        for i, row in enumerate(cells):
            lines.append(self.paint(self._row(row, widths, left), *(styles[i] if i < len(styles) else ())))
        return ["  " + line for line in lines]

    @staticmethod
    def _row(cells: Sequence[str], widths: Sequence[int], left: Sequence[int]) -> str:
        shown = (padded(cut(c, w), w, right=i not in left) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return "  ".join(shown).rstrip()
