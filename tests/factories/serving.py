"""A bundle whose engine is numpy, quick and easily told to fail, and the traffic that tries the batcher with it.

The engine doubles whole numbers and adds one: the answer to a row that holds nothing but its own number is
unmistakable. Some numbers make it fail, end its process, or wait.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.serving import shipped
from workers.serving.batcher import Batcher, Failed, InvalidRequest, Rejected, TimedOut

FAILS, REFUSES, DIES, WAITS = -1, -2, -3, -4

_INFER = f"""
import os
import time

import numpy as np


class ShapeRefused(ValueError):
    pass


def load(threads=None):
    def run(feeds):
        x = feeds["x"]
        if (x == {FAILS}).any():
            raise RuntimeError("this one fails")
        if (x == {REFUSES}).any():
            raise ShapeRefused("this one is refused")
        if (x == {DIES}).any():
            os._exit(7)
        if (x == {WAITS}).any():
            time.sleep(0.2)
        return {{"y": 2 * x + 1, "width": np.full(len(x), x.shape[1], np.int64)}}

    return ["x"], run
"""


def bundle(folder: Path, infer: str = _INFER, **settings: Any) -> Path:
    """What a user unpacks, with this `infer.py`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in shipped().items():
        (folder / name).write_bytes(source)
    (folder / "infer.py").write_text(infer)
    (folder / "serving.json").write_text(json.dumps(settings))
    tensors = {
        "inputs": [{"name": "x", "dtype": "int64", "shape": ["batch", "width"]}],
        "outputs": [
            {"name": "y", "dtype": "int64", "shape": ["batch", "width"]},
            {"name": "width", "dtype": "int64", "shape": ["batch"]},
        ],
    }
    (folder / "manifest.json").write_text(json.dumps({"name": "doubling", "engine": {"format": "numpy"}, **tensors}))
    return folder


@dataclass(frozen=True)
class Ask:
    """One request: `number` tells it from all others; `kind`: a number that the engine does not like, or 0."""

    number: int
    rows: int = 1
    width: int = 4
    kind: int = 0
    deadline_s: float | None = None
    leaves_after_s: float | None = None
    caller: str = ""

    def feeds(self) -> dict[str, Any]:
        rows = np.arange(self.number * 8, self.number * 8 + self.rows, dtype=np.int64)
        x = np.repeat(rows[:, None], self.width, axis=1)
        if self.kind:
            x[-1, -1] = self.kind
        return {"x": x}


def drawn(rng: random.Random, number: int, *, deaths: float = 0.0) -> Ask:
    """Sizes, callers, deadlines and failures as they come."""
    kind = 0
    if rng.random() < 0.02:
        kind = FAILS if rng.random() < 0.5 else REFUSES
    if rng.random() < deaths:
        kind = DIES
    deadline = rng.choice((None, None, None, 5.0, rng.random() * 0.02))
    leaves = rng.random() * 0.01 if rng.random() < 0.03 else None
    width = rng.choice((3, 4, 9))
    return Ask(number, rng.choice((1, 1, 1, 2, 3, 7)), width, kind, deadline, leaves, rng.choice("abcd"))


async def outcome(batcher: Batcher, ask: Ask) -> str:
    """How it ended, in one word; raises AssertionError where the answer is another's, or the error not its own."""
    feeds = ask.feeds()
    try:
        if ask.leaves_after_s is None:
            found = await batcher.submit(feeds, ask.deadline_s, ask.caller)
        else:
            async with asyncio.timeout(ask.leaves_after_s):
                found = await batcher.submit(feeds, ask.deadline_s, ask.caller)
    except TimedOut:
        assert ask.deadline_s is not None
        return "timed_out"
    except TimeoutError:
        return "left"
    except Rejected:
        return "rejected"
    except InvalidRequest:
        assert ask.kind == REFUSES
        return "refused"
    except Failed as error:
        if (error.code, ask.kind) not in (("inference_failed", FAILS), ("instance_died", DIES)):
            raise AssertionError(f"{ask} ended with {error.code}: {error}") from error
        return error.code
    assert ask.kind in (0, WAITS), ask
    assert found.keys() == {"y", "width"}
    assert found["y"].shape == feeds["x"].shape
    assert (found["y"] == 2 * feeds["x"] + 1).all(), ask
    assert (found["width"] == ask.width).all()
    assert found["width"].shape == (ask.rows,)
    return "ok"


async def play(batcher: Batcher, seed: int, requests: int, at_once: int, *, deaths: float = 0.0) -> Counter[str]:
    """So many requests, so many of them under way at a time; how they ended."""
    rng, ended, numbers = random.Random(seed), Counter[str](), iter(range(1, requests + 1))

    async def caller() -> None:
        for number in numbers:
            how = await outcome(batcher, drawn(rng, number, deaths=deaths))
            ended[how] += 1
            if how == "rejected":
                await asyncio.sleep(0.05)
            elif rng.random() < 0.01:
                await asyncio.sleep(rng.random() * 0.005)

    await asyncio.gather(*(caller() for _ in range(at_once)))
    return ended
