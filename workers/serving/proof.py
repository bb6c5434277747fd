"""A bundle, run as its user will: `infer.py` and `serve.py` in clean processes, on the sample that lies beside them."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.domain.failures import StageFailure
from workers.serving.probe import apart
from workers.serving.v2_client import Connection, Refused

if TYPE_CHECKING:
    from workers.kernel import Arrays

_LIMIT_S = 300.0
_LOG = "proof.log"
_TOLD = 1500  # of what a process wrote


def run_bundle(
    folder: Path, name: str, examples: Sequence[tuple[Arrays, Arrays]], allowed: float, *, at_once: bool
) -> dict[str, Any]:
    """What was seen: {infer_s, serve_s, largest_difference}. `folder`: the unpacked bundle, which is written to;
    `name`: the model's; `examples`: (sample, expected output) for each engine in it; `allowed`: see
    `workers.serving.probe.apart`. `at_once`: both beside each other, where the machine holds two of these engines.

    Raises StageFailure `bundle_fails`."""
    start = time.perf_counter()
    with ExitStack() as stack:
        infer = stack.enter_context(_process(folder, "infer", _infer_arguments(folder)))
        if not at_once:
            _finished(infer, folder)
        infer_s = time.perf_counter() - start
        serve = stack.enter_context(_process(folder, "serve", ["serve.py", "--port", "0"]))
        port = _port(serve, folder)
        worst = max(_asked(port, name, *example, allowed, folder) for example in examples)
        serve.send_signal(signal.SIGTERM)
        if at_once:
            infer_s = _finished(infer, folder) - start
        _finished(serve, folder)
    return {
        "infer_s": round(infer_s, 3),
        "serve_s": round(time.perf_counter() - start - (0.0 if at_once else infer_s), 3),
        "largest_difference": worst,
    }


def _infer_arguments(folder: Path) -> list[str]:
    """Without the runs that only tell the latency, where the script can leave them out."""
    script = (folder / "infer.py").read_text(encoding="utf-8")
    return ["infer.py", "--repeat", "1"] if '"--repeat"' in script else ["infer.py"]


@contextmanager
def _process(folder: Path, what: str, arguments: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    with (folder / f"{what}-{_LOG}").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if what == "serve" else log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _finished(process: subprocess.Popen[bytes], folder: Path) -> float:
    """When it had ended, which it is to do with exit code 0."""
    what = Path(str(process.args[1])).stem  # type: ignore[index]
    try:
        code = process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise _failure(folder, what, f"did not end within {_LIMIT_S:.0f} s") from None
    if code:
        raise _failure(folder, what, f"ended with exit code {code}")
    return time.perf_counter()


def _port(serve: subprocess.Popen[bytes], folder: Path) -> int:
    """That it listens on, once it is ready."""
    assert serve.stdout is not None
    told = b""
    if select.select([serve.stdout], [], [], _LIMIT_S)[0]:
        told = serve.stdout.readline()
    found = re.search(rb"http://\S+:(\d+)", told)
    if found is None:
        raise _failure(folder, "serve", "did not come to listen")
    return int(found[1])


def _asked(port: int, name: str, sample: Arrays, expected: Arrays, allowed: float, folder: Path) -> float:
    """The largest difference of its answer, over the largest number of an output."""
    connection, worst = Connection(port, name, _LIMIT_S), 0.0
    try:
        answer: Mapping[str, Any] = connection.infer(sample, list(expected))
    except (Refused, OSError, http.client.HTTPException) as error:
        raise _failure(folder, "serve", f"did not answer: {error}") from None
    finally:
        connection.close()
    for output, wanted in expected.items():
        off = apart(answer[output], wanted)
        worst = max(worst, off)
        if off > (allowed if wanted.dtype.kind in "fV" else 0.0):
            raise _failure(folder, "serve", f"answered otherwise: output {output} is off by {off:.3g} of its largest")
    return worst


def _failure(folder: Path, what: str, how: str) -> StageFailure:
    text = ""
    with contextlib.suppress(OSError):
        text = (folder / f"{what}-{_LOG}").read_text(encoding="utf-8", errors="replace")[-_TOLD:].strip()
    return StageFailure(
        "bundle_fails",
        f"{what}.py of the bundle, run as its user would, {how}." + (f" It wrote: {text}" if text else ""),
        remedy="Submit again; if it comes back, choose other backends.",
        cacheable=False,
    )
