"""A graph's structure in a few lines: its operators in order, with what repeats told once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from operator import eq
from typing import TypedDict

MOST_NODES = 2048  # that are looked at
_LONGEST = 128  # operators of a block
_MOST_SPLITS = 32  # how often what is left is looked through again: bounds the work
_MOST_TOLD = 300  # operators in all blocks


class Block(TypedDict):
    """Operators that follow each other, `times` times in a row."""

    times: int
    ops: list[str]


class Outline(TypedDict):
    """`left_out`: nodes after those that the blocks tell of."""

    blocks: list[Block]
    left_out: int


def outline(ops: Sequence[str], nodes: int) -> Outline:
    """`ops`: of the first nodes, in the file's order, which is one that they can be computed in; `nodes`: how many
    there are."""
    found: list[Block] = []
    told = seen = 0
    for block in _folded([*ops[:MOST_NODES]]):
        room = _MOST_TOLD - told
        if len(block["ops"]) > room:
            if block["times"] == 1 and room > 0:
                found.append({"times": 1, "ops": block["ops"][:room]})
                seen += room
            break
        found.append(block)
        told += len(block["ops"])
        seen += block["times"] * len(block["ops"])
    return {"blocks": found, "left_out": max(nodes - seen, 0)}


def _folded(ops: list[str]) -> list[Block]:
    """Where most can be left out by telling a repeated block once, first; then what is before and behind it."""
    parts: list[tuple[int, int]] = [(0, len(ops))]
    repeated: list[tuple[int, int, int]] = []  # start, length of a block, times
    for _ in range(_MOST_SPLITS):
        if not parts:
            break
        start, end = parts.pop()
        best = _best(ops[start:end])
        if best is None:
            continue
        at, length, times = best
        repeated.append((start + at, length, times))
        parts += [(start, start + at), (start + at + length * times, end)]
    found: list[Block] = []
    done = 0
    for at, length, times in [*sorted(repeated), (len(ops), 0, 0)]:
        if at > done:
            found.append({"times": 1, "ops": ops[done:at]})
        if times:
            found.append({"times": times, "ops": ops[at : at + length]})
        done = at + length * times
    return found


def _best(ops: list[str]) -> tuple[int, int, int] | None:
    """Start, length and times of the repetition that saves most; of equal ones the shortest. None where none saves two
    operators."""
    most, best = 1, None
    for length in range(1, min(_LONGEST, len(ops) // 2) + 1):
        run = 0  # how many operators in a row are those of one length before
        for at, same in enumerate([*map(eq, ops, ops[length:]), False]):
            if same:
                run += 1
                continue
            times = run // length + 1
            if length * (times - 1) > most:
                most, best = length * (times - 1), (at - run, length, times)
            run = 0
    return best
