"""Schemathesis at a real API process: requests that it makes of the OpenAPI document, valid ones and others, alone and
one after the other, and whether each answer is one that the document names.

    .venv/bin/python -m benchmarks.fuzz.contract --inputs 100000
    .venv/bin/python -m benchmarks.fuzz.contract --seconds 60 --seed 7

It runs in an environment of its own (`tests/integrations/requirements-schemathesis.txt`), as often as it takes for so
many inputs, each time with another seed. A find is a status, a media type, a header or a body that is not as the
document says, a 5xx, or an error in the service's log; each is printed with its `curl`, and the status is 1. Meanwhile
there is always a model, a data set, an upload and a job to be found by id, whatever is deleted, and jobs do not stay
queued, so that their streams end.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.fuzz.http import SETTINGS, crashes
from benchmarks.fuzz.intake import data_sets, models
from tests.factories.deployment import Deployment, deployment
from tests.integrations.environments import environment

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
_COUNTED = re.compile(r"^anneal_http_requests_total\{[^}]*\} ([0-9.e+]+)$", re.MULTILINE)
_RAW = {"Content-Type": "application/octet-stream"}


@dataclass
class Found:
    """`inputs`: requests that Schemathesis sent. `reports`: what it says of each run that found something."""

    inputs: int = 0
    runs: int = 0
    reports: list[str] = field(default_factory=list)


class Keeper:
    """Sees to it that there is one of each kind, and that no job waits for ever. Counts its own requests."""

    def __init__(self, url: str) -> None:
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=30)
        self.sent = self.before = 0

    def ask(self, method: str, path: str, **options: Any) -> Any:
        self.sent += 1
        answer = self.client.request(method, path, **options)
        return answer.json() if answer.headers.get("content-type", "").endswith("json") else {}

    def keep(self) -> None:
        for job in self.ask("GET", "/v1/jobs?status=queued&limit=200").get("items", ()):
            self.ask("POST", f"/v1/jobs/{job['id']}/cancel")
        found = {kind: self.ask("GET", f"/v1/{kind}?limit=1").get("items") for kind in ("models", "datasets", "jobs")}
        if not found["models"]:
            found["models"] = [self.ask("POST", "/v1/models?filename=m.onnx", content=models()[0], headers=_RAW)]
        if not found["datasets"]:
            self.ask("POST", "/v1/datasets?filename=d.npz", content=data_sets()[0], headers=_RAW)
        if not found["jobs"]:
            self.ask("POST", "/v1/jobs", json={"model_id": found["models"][0].get("id")})

    def requests(self) -> int:
        """How many the service has answered, but for ours."""
        self.sent += 1
        text = self.client.get("/metrics").text
        # The one that asks is counted after its answer.
        return int(sum(float(count) for count in _COUNTED.findall(text))) - (self.sent - 1) - self.before

    def run(self, over: threading.Event) -> None:
        while not over.wait(0.3):
            with contextlib.suppress(httpx.HTTPError):
                self.keep()


@contextlib.contextmanager
def kept(url: str) -> Iterator[Keeper]:
    over, keeper = threading.Event(), Keeper(url)
    keeper.before = keeper.requests()
    for _ in range(2):  # the second time it sees what it made
        keeper.keep()
    asked = {"filename": "m.onnx", "size_bytes": 5 << 20}
    keeper.ask("POST", "/v1/uploads", json=asked)
    thread = threading.Thread(target=keeper.run, args=(over,))
    thread.start()
    try:
        yield keeper
    finally:
        over.set()
        thread.join()
        keeper.client.close()


def fuzz(deployed: Deployment, folder: Path, inputs: int, seconds: float, seed: int, examples: int) -> Found:
    """So many inputs, or as many as the seconds allow."""
    found, began = Found(), time.monotonic()
    command = environment("schemathesis") / "bin" / "st"
    with kept(deployed.url) as keeper:
        while found.inputs < inputs and (left := seconds - (time.monotonic() - began)) > 0:
            report = run(command, deployed.url, folder, seed + found.runs, examples, left)
            found.runs += 1
            found.inputs = keeper.requests()
            if report is not None:
                found.reports.append(report)
                print(report, flush=True)
            told = f"{found.inputs} inputs after {time.monotonic() - began:.0f} s, {len(found.reports)} runs with finds"
            print(f"  {told}", file=sys.stderr, flush=True)
    return found


def run(command: Path, url: str, folder: Path, seed: int, examples: int, seconds: float) -> str | None:
    """What it says; None where it found nothing."""
    options = ["--checks", ",".join(CHECKS), "--mode", "all", "--seed", str(seed), "--max-examples", str(examples)]
    options += [
        "--continue-on-failure",
        "--generation-database",
        "none",
        "--request-timeout",
        "30",
        "--warnings",
        "off",
    ]
    options += ["--suppress-health-check", "all", "--output-truncate", "false"]
    try:
        done = subprocess.run(
            [str(command), "--no-color", "run", f"{url}/openapi.json", *options],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=None if seconds == float("inf") else seconds + 60,
        )
    except subprocess.TimeoutExpired as slow:
        out = slow.stdout or b""
        text = out.decode(errors="replace") if isinstance(out, bytes) else out
        return text if "FAILURES" in text else None
    return None if done.returncode == 0 else done.stdout + done.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=100, help="of each operation, in a run (100)")
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, deployment(Path(name) / "home", SETTINGS) as deployed:
        found = fuzz(deployed, Path(name), asked.inputs, asked.seconds, asked.seed, asked.examples)
        traces = crashes(deployed)
    print(
        f"{found.inputs} inputs in {found.runs} runs, {time.monotonic() - began:.0f} s, "
        f"{len(found.reports)} runs with finds, {len(traces)} traces"
    )
    print(*traces[:10], sep="\n")
    return 1 if found.reports or traces else 0


if __name__ == "__main__":
    sys.exit(main())
