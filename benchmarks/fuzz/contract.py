"""Schemathesis at a real API process: requests that it makes of the OpenAPI document, valid ones and others, alone and
one after the other, and whether each answer is one that the document names.

    .venv/bin/python -m benchmarks.fuzz.contract --inputs 100000 --notes build/contract.jsonl
    .venv/bin/python -m benchmarks.fuzz.contract --seconds 60 --seed 7

It runs in an environment of its own (`tests/integrations/requirements-schemathesis.txt`), as often as it takes for so
many inputs, each time with another seed; what does not depend on the seed (boundary values) and keys that are none are
tried the first time only: what is answered 401 came nowhere, and does not count. Nothing is deleted in three of four
runs, so that the rest of the API has something to answer with. With `--notes` each run is a line of that file, and the
same command goes on after the last one: what is cut (Ctrl-C, SIGTERM) loses nothing, and `--inputs 0` tells what was
found so far.

A find is a status, a media type, a header or a body that is not as the document says, a 5xx, or an error in the
service's log; each is printed with its `curl`, and the status is 1. There is always a model, a data set, an upload and
a job to be found by id, whatever is deleted, and an engine, made by a real worker, at the beginning of each run; jobs
do not stay queued, so that their streams end. It asks with a key of the role `operator`, so that all of the API is open
to it: what it does to its own tenant and key there is undone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select, update

from app.db.accounts import ApiKey, Tenant
from app.db.uow import Database
from app.domain.plan import Limits
from app.domain.roles import Role
from app.tenants.callers import hash_key
from app.tenants.keys import create_key
from benchmarks.fuzz.http import SETTINGS, crashes
from benchmarks.fuzz.intake import data_sets, models
from tests.factories.deployment import Deployment, deployment
from tests.integrations.environments import environment

KEYED = {**SETTINGS, "ANNEAL_REQUIRE_KEYS": "true"}
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
_ALL_PHASES = "examples,coverage,fuzzing,stateful"
_SEEDED_PHASES = "fuzzing,stateful"
_DELETES_IN = 4  # one of so many runs
_JOB_S = 300.0
_COUNTED = re.compile(
    r'^anneal_http_requests_total\{method="([^"]*)",route="([^"]*)",status="(\d+)"\} ([0-9.e+]+)$', re.MULTILINE
)
_NO_LIMITS = dict.fromkeys(Limits.model_fields)
_RAW = {"Content-Type": "application/octet-stream"}
_QUICK: dict[str, Any] = {
    "precisions": ["fp32"],
    "target": {"backends": ["onnxruntime"]},
    "benchmark": {"batch_sizes": [1], "min_seconds": 0.1, "allow_noisy": True},
    "budget_seconds": 30,
}


@dataclass
class Run:
    """One of Schemathesis. `answers`: how often each "METHOD route status" came. `report`: what it says, where it found
    something. `traces`: errors in the service's log meanwhile."""

    seed: int
    seconds: float
    answers: dict[str, int]
    report: str | None = None
    traces: list[str] = field(default_factory=list)


@dataclass
class Found:
    """All runs, those of an earlier start, too. `notes`: where each is written as it ends."""

    notes: Path | None = None
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def noted(cls, notes: Path | None) -> Found:
        """With what stands there already."""
        lines = notes.read_text().splitlines() if notes is not None and notes.is_file() else []
        return cls(notes, [Run(**json.loads(line)) for line in lines])

    def add(self, run: Run) -> None:
        self.runs.append(run)
        if self.notes is not None:
            self.notes.parent.mkdir(parents=True, exist_ok=True)
            with self.notes.open("a") as file:
                file.write(json.dumps(asdict(run)) + "\n")

    @property
    def answers(self) -> Counter[str]:
        return sum((Counter(run.answers) for run in self.runs), Counter[str]())

    @property
    def inputs(self) -> int:
        """Requests that Schemathesis sent, but for those that were `refused`."""
        return self.answers.total() - self.refused

    @property
    def refused(self) -> int:
        """Of those that came with a key that is none."""
        return sum(count for key, count in self.answers.items() if key.endswith(" 401"))

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)

    @property
    def reports(self) -> list[str]:
        return [run.report for run in self.runs if run.report is not None]

    @property
    def traces(self) -> list[str]:
        return [trace for run in self.runs for trace in run.traces]


class Home:
    """The tenant and the key of whoever fuzzes, which may switch off the one and revoke the other."""

    def __init__(self, db: Database) -> None:
        self._db, self.key = db, ""

    def mend(self) -> None:
        """They are as they have to be; `key` may be another one then."""
        with self._db.read() as session:
            found = session.execute(
                select(Tenant)
                .join(ApiKey, ApiKey.tenant_id == Tenant.id)
                .where(
                    ApiKey.key_sha256 == hash_key(self.key), ApiKey.revoked_at.is_(None), ApiKey.expires_at.is_(None)
                )
            ).scalar_one_or_none()
        if found is None:
            self.key = create_key(self._db, "fuzz", "fuzz", Role.OPERATOR)
        elif (found.disabled_at, found.limits, found.retention) == (None, _NO_LIMITS, None):
            return
        whole = {"disabled_at": None, "limits": _NO_LIMITS, "retention": None}
        with self._db.write() as uow:
            uow.session.execute(update(Tenant).where(Tenant.name == "fuzz").values(**whole))


class Keeper:
    """Sees to it that there is one of each kind, and that no job waits for ever. Counts its own requests."""

    def __init__(self, url: str, home: Home) -> None:
        self.client = httpx.Client(base_url=url, trust_env=False, timeout=30)
        self.home = home
        self._own = Counter[str]()
        self._one_at_a_time = threading.Lock()

    def ask(self, method: str, route: str, query: str = "", *, job_id: str = "", **options: Any) -> Any:
        answer = self.client.request(method, route.format(job_id=job_id) + query, **options)
        self._own[f"{method} {route} {answer.status_code}"] += 1
        return answer.json() if answer.headers.get("content-type", "").endswith("json") else {}

    def keep(self) -> None:
        with self._one_at_a_time:
            self._keep()

    def engine(self, deployed: Deployment) -> None:
        """Sees to it that there is one, and with it a job that ended well, its report and its bundle."""
        with self._one_at_a_time:
            self._cancel_what_waits()
            if self.ask("GET", "/v1/engines", "?limit=1").get("items"):
                return
            model = self.ask("POST", "/v1/models", "?filename=m.onnx", content=models()[0], headers=_RAW)
            worker, deadline = deployed.start_hurried_worker(), time.monotonic() + _JOB_S
            try:
                deployed.wait_ready(_JOB_S)
                job = self.ask("POST", "/v1/jobs", json={"model_id": model["id"], **_QUICK})
                while job["status"] in ("queued", "running") and time.monotonic() < deadline:
                    time.sleep(0.2)
                    job = self.ask("GET", "/v1/jobs/{job_id}", job_id=job["id"])
            finally:
                worker.terminate()
                worker.wait()
            if job["status"] != "succeeded":
                raise RuntimeError(f"There is no engine: {job}")

    def _cancel_what_waits(self) -> None:
        self.home.mend()
        self.client.headers["Authorization"] = f"Bearer {self.home.key}"
        for job in self.ask("GET", "/v1/jobs", "?status=queued&limit=200").get("items", ()):
            self.ask("POST", "/v1/jobs/{job_id}/cancel", job_id=job["id"])

    def _keep(self) -> None:
        self._cancel_what_waits()
        found = {
            kind: self.ask("GET", f"/v1/{kind}", "?limit=1").get("items") for kind in ("models", "datasets", "jobs")
        }
        if not found["models"]:
            found["models"] = [self.ask("POST", "/v1/models", "?filename=m.onnx", content=models()[0], headers=_RAW)]
        if not found["datasets"]:
            self.ask("POST", "/v1/datasets", "?filename=d.npz", content=data_sets()[0], headers=_RAW)
        if not found["jobs"]:
            self.ask("POST", "/v1/jobs", json={"model_id": found["models"][0].get("id")})

    def answers(self) -> Counter[str]:
        """What the service has answered since it began, but for what it answered us."""
        with self._one_at_a_time:
            answer = self.client.get("/metrics")
            told = _COUNTED.findall(answer.text)
            found = Counter({f"{method} {route} {status}": int(float(n)) for method, route, status, n in told})
            found -= self._own
            self._own[f"GET /metrics {answer.status_code}"] += 1  # counted there once it has been answered
            return found

    def run(self, over: threading.Event) -> None:
        while not over.wait(0.3):
            with contextlib.suppress(httpx.HTTPError):
                self.keep()


@contextlib.contextmanager
def kept(deployed: Deployment) -> Iterator[Keeper]:
    over, db = threading.Event(), deployed.database()
    keeper = Keeper(deployed.url, Home(db))
    for _ in range(2):  # the second time it sees what it made
        keeper.keep()
    keeper.ask("POST", "/v1/uploads", json={"filename": "m.onnx", "size_bytes": 5 << 20})
    thread = threading.Thread(target=keeper.run, args=(over,))
    thread.start()
    try:
        yield keeper
    finally:
        over.set()
        thread.join()
        keeper.client.close()
        db.close()


def fuzz(
    deployed: Deployment,
    folder: Path,
    inputs: int,
    seconds: float,
    seed: int,
    examples: int,
    found: Found | None = None,
    workers: int = 1,
) -> Found:
    """So many inputs, or as many as the seconds allow, at a service that asks for keys (`KEYED`). `found`: what earlier
    ones did, which counts. `workers`: how many operations are asked at once."""
    found, began, told = Found() if found is None else found, time.monotonic(), 0
    command = environment("schemathesis") / "bin" / "st"
    with kept(deployed) as keeper:
        while found.inputs < inputs and (left := seconds - (time.monotonic() - began)) > 0:
            keeper.engine(deployed)
            number = seed + len(found.runs)
            options = [*_what(len(found.runs)), "--seed", str(number), "--max-examples", str(examples)]
            options += ["--workers", str(workers), "--header", f"Authorization: Bearer {keeper.home.key}"]
            before, at, answers = keeper.answers(), time.monotonic(), Counter[str]()
            report, cut = None, True
            try:
                report = run(command, deployed.url, folder, options, left)
                cut = False
            finally:  # one that is cut counts for what it asked
                with contextlib.suppress(httpx.HTTPError):
                    answers = keeper.answers() - before
                if not answers and not cut:
                    report = f"The service answered nothing to seed {number}.\n{report or ''}"
                traces = crashes(deployed)
                found.add(Run(number, round(time.monotonic() - at, 1), dict(answers), report, traces[told:]))
            told = len(traces)
            for text in (report, *found.runs[-1].traces):
                if text:
                    print(text, flush=True)
            finds = f"{len(found.reports)} runs with finds, {len(found.traces)} traces"
            _say(f"seed {number}: {answers.total()} answers, {found.inputs} inputs by now, {finds}")
            if not answers:
                break
    return found


def _what(run: int) -> list[str]:
    """What the run of this number is to try."""
    if not run:
        return ["--phases", _ALL_PHASES]
    options = ["--phases", _SEEDED_PHASES, "--generation-with-security-parameters", "false"]
    return options if run % _DELETES_IN == 0 else [*options, "--exclude-method", "DELETE"]


def _say(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(command: Path, url: str, folder: Path, options: list[str], seconds: float) -> str | None:
    """What it says; None where it found nothing."""
    options = ["--checks", ",".join(CHECKS), "--mode", "all", *options, "--continue-on-failure"]
    options += ["--generation-database", "none", "--request-timeout", "30", "--warnings", "off"]
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


def table(answers: Counter[str]) -> str:
    """As Markdown: of each operation, how often each status came."""
    by_operation: dict[str, list[str]] = {}
    for key, count in sorted(answers.items()):
        operation, _, status = key.rpartition(" ")
        by_operation.setdefault(operation, []).append(f"{status}: {count}")
    rows = [f"| `{operation}` | {', '.join(told)} |" for operation, told in by_operation.items()]
    return "\n".join(("| operation | answers |", "|---|---|", *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--examples", type=int, default=100, help="of each operation, in a run (100)")
    parser.add_argument("--workers", type=int, default=1, help="operations that are asked at once (1)")
    parser.add_argument("--notes", type=Path, metavar="FILE", help="a line of JSON for each run; goes on where it ends")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = Found.noted(asked.notes)
    if found.inputs < asked.inputs:
        limits = (asked.inputs, asked.seconds, asked.seed, asked.examples)
        with (
            tempfile.TemporaryDirectory(prefix="fuzz-") as name,
            deployment(Path(name) / "home", KEYED) as deployed,
            contextlib.suppress(KeyboardInterrupt),
        ):
            fuzz(deployed, Path(name), *limits, found, asked.workers)
    statuses = Counter[str]()
    for key, count in found.answers.items():
        statuses[key.rpartition(" ")[2]] += count
    print(table(found.answers))
    print(f"\nBy status: {dict(sorted(statuses.items()))}")
    print(
        f"{found.inputs} inputs and {found.refused} with a key that is none in {len(found.runs)} runs, "
        f"{found.seconds:.0f} s, "
        f"{len(found.reports)} runs with finds, {len(found.traces)} traces"
    )
    return 1 if found.reports or found.traces else 0


if __name__ == "__main__":
    sys.exit(main())
