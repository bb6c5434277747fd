"""200 calls of a stage, of which many are left by an exception somewhere: raised by a callback, or by a signal's
handler wherever the call just is, between two instructions even. A program of its own (argument: a folder): such a
signal may hit any code of the process, and pytest's is not made for that. Exits with 0 where no call saw what another
one left."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path
from typing import Any

import psutil

from workers.pipeline.isolated import IsolatedRunner
from workers.pipeline.protocol import Limits, StageRequest

LIMITS = Limits(20, 4 << 30, 8 << 20)
CALLS = 200


class Thrown(Exception):
    """What the ledger raises when the database hiccups, say."""


def main(root: Path) -> None:
    runner = IsolatedRunner(["tests.factories.stages"])
    chance = random.Random(5)
    thrown = 0

    def throw(*_: Any) -> None:
        raise Thrown

    def maybe(*_: Any) -> bool:
        if chance.random() < 0.2:
            raise Thrown
        return False

    signal.signal(signal.SIGALRM, throw)
    runner.start()
    for number in range(CALLS):
        folder = root / str(number)
        (folder / "work").mkdir(parents=True)
        work, out = str(folder / "work"), str(folder / "out")
        request = StageRequest("misbehave", {"how": "chatter"}, {}, work, out, {}, LIMITS)
        how = number % 4
        try:
            if how == 3:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0005, 0.08))
            runner.run(
                request,
                on_progress=maybe if how == 1 else lambda *_: None,
                should_stop=maybe if how == 2 else lambda: False,
            )
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Thrown:
            thrown += 1
            assert how, "nobody raised anything"
        # Its own result, not its predecessor's; and after an exception nothing of it goes on writing.
        assert how or (folder / "out" / "file" / "out.txt").exists(), "without its own result"
        assert not [p for p in _family() if p.name() == "anneal-stage" and p.is_running()], "it runs on"
    runner.close()
    assert thrown > CALLS // 4, f"only {thrown} exceptions"
    _, alive = psutil.wait_procs(_family(), timeout=10)
    assert not alive, f"left: {alive}"


def _family() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
