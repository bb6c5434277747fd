"""`python -m tests.factories.search_elsewhere RECORDING|-`: a process that executes a search's calls, one JSON line
each on its standard input, and knows nothing else of the search.

RECORDING answers as that search was answered; `-`: by a desk of its own for each call, over a scripted evaluator whose
table and nodes are the first line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.factories.search_script import Clock, Script, Truth
from workers.search.calls import Call, execute
from workers.search.desk import Desk
from workers.search.recording import Recording
from workers.search.requests import Answer, Request


@contextmanager
def another_process(recording: Path | None, *first: Any) -> Iterator[Callable[[Mapping[str, Any]], Mapping[str, Any]]]:
    """What sends a call there and waits for the reply; `first`: what it is told before, if anything."""
    command = [sys.executable, "-m", "tests.factories.search_elsewhere", str(recording or "-")]
    root = str(Path(__file__).resolve().parents[2])  # the tests run in a scratch folder, and are no installed package
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def tell(value: Any) -> None:
            process.stdin.write(json.dumps(value) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]

        def send(call: Mapping[str, Any]) -> Mapping[str, Any]:
            tell(call)
            reply: Mapping[str, Any] = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return reply

        for value in first:
            tell(value)
        yield send
        process.stdin.close()
    assert process.returncode == 0


def _recorded(path: Path) -> Callable[[Request], Answer]:
    steps = Recording.read(path.read_text().splitlines()).steps
    answers = {Call(request, asked).id: answer for asked, request, _, answer in steps}
    assert len(answers) == len(steps), "each is a call of its own"
    return lambda request: answers[Call(request, 0.0).id]


def _scripted(table: Mapping[str, Any]) -> Callable[[Request], Answer]:
    truths = {cid: Truth(**truth) for cid, truth in table["truths"].items()}
    evaluator: Any = lambda: Script(truths, Clock(), nodes=table["nodes"])  # noqa: E731
    return lambda request: Desk(evaluator()).answer(request)


def main() -> None:
    which = sys.argv[1]
    answer = _scripted(json.loads(sys.stdin.readline())) if which == "-" else _recorded(Path(which))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(execute(Call.from_json(json.loads(line)), answer)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
