"""A bundle, run as its user will: `infer.py` and `serve.py` in clean processes, on the sample that lies beside them."""

from __future__ import annotations

import contextlib
import http.client
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.domain.failures import StageFailure
from workers.serving.launching import port_of, process, server_command
from workers.serving.probe import apart
from workers.serving.v2_client import Connection, Refused

if TYPE_CHECKING:
    from workers.kernel import Arrays

_LIMIT_S = 300.0
_LOG = "proof.log"
_TOLD = 1500  # of what a process wrote


def run_bundle(
    folder: Path,
    name: str,
    examples: Sequence[tuple[Arrays, Arrays]],
    allowed: float,
    *,
    at_once: bool,
    arguments: Sequence[str] = (),
) -> dict[str, Any]:
    """What was seen: {infer_s, serve_s, largest_difference}. `folder`: the unpacked bundle, which is written to;
    `name`: the model's; `examples`: (sample, expected output) for each engine in it; `allowed`: see
    `workers.serving.probe.apart`. `at_once`: both beside each other, where the machine holds two of these engines.
    `arguments`: of `infer.py` (`kernel.Backend.script_hurry`).

    Raises StageFailure `bundle_fails`."""
    start = time.perf_counter()
    with ExitStack() as stack:
        infer = stack.enter_context(process(folder, _log(folder, "infer"), [sys.executable, "infer.py", *arguments]))
        if not at_once:
            _finished(infer, folder, "infer")
        infer_s = time.perf_counter() - start
        serve = stack.enter_context(process(folder, _log(folder, "serve"), server_command(), reads=True))
        port = _port(serve, folder)
        worst = max(_asked(port, name, *example, allowed, folder) for example in examples)
        serve.send_signal(signal.SIGTERM)
        if at_once:
            infer_s = _finished(infer, folder, "infer") - start
        _finished(serve, folder, "serve")
    return {
        "infer_s": round(infer_s, 3),
        "serve_s": round(time.perf_counter() - start - (0.0 if at_once else infer_s), 3),
        "largest_difference": worst,
    }


def _finished(started: subprocess.Popen[bytes], folder: Path, what: str) -> float:
    """When it had ended, which it is to do with exit code 0."""
    try:
        code = started.wait(_LIMIT_S)
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
    port = port_of(told)
    if port is None:
        raise _failure(folder, "serve", "did not come to listen")
    return port


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


def _log(folder: Path, what: str) -> Path:
    return folder / f"{what}-{_LOG}"


def _failure(folder: Path, what: str, how: str) -> StageFailure:
    text = ""
    with contextlib.suppress(OSError):
        text = _log(folder, what).read_text(encoding="utf-8", errors="replace")[-_TOLD:].strip()
    return StageFailure(
        "bundle_fails",
        f"{what}.py of the bundle, run as its user would, {how}." + (f" It wrote: {text}" if text else ""),
        remedy="Submit again; if it comes back, choose other backends.",
        cacheable=False,
    )
