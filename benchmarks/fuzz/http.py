"""Requests that nobody meant, of every operation of the OpenAPI document, at a real API process.

    .venv/bin/python -m benchmarks.fuzz.http --requests 50000 --seed 1

Values are made by the document's schemas, and then made wrong: other types, other sizes, missing and unknown fields,
bytes that are no text. Each answer has to be one that the document names: status, media type, and the body's schema.
What is none, a 500, or a connection that is lost is a find: it is printed, and the status is 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from benchmarks.fuzz.intake import data_sets, models
from benchmarks.fuzz.mutate import mutated
from benchmarks.fuzz.schemas import Schemas
from tests.factories.deployment import Deployment, deployment

Json = dict[str, Any]

# Streams and long polls end at once; what waits for a lease or a body is another test's. Wrong keys are told each time.
SETTINGS = {
    "LIMIT_WAIT_S": "0",
    "LIMIT_COMPLETE_WAIT_S": "5",
    "LIMIT_WRONG_KEYS_PER_MINUTE": "0",
    "ANNEAL_LOG_LEVEL": "WARNING",
}
_TIMEOUT_S = 30
_LINES_TOLD = 40
_TEXTS = (
    "",
    " ",
    "\0",
    "\x7f",
    "\ud7ff",
    "é" * 300,
    "😀",
    "a" * 5000,
    "../../etc/passwd",
    "%00",
    "'; --",
    "1e309",
    "-1",
    "NaN",
)


@dataclass
class Found:
    """`answers`: how often each (operation, status) came. `finds`: what is not in the document."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    finds: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.answers.total()


@dataclass
class Request:
    operation: str
    told: Json
    target: str
    headers: dict[str, str]
    body: bytes | None
    elsewhere: bool  # its path may be that of no operation


class Fuzzer:
    """Asks one server. `known`: ids that there are, by the name of the path's parameter."""

    def __init__(self, port: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.port = port
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_TIMEOUT_S)
        self.document: Json = json.loads(self._plain("GET", "/openapi.json"))
        self.schemas = Schemas(self.document, self.rng)
        self.operations = [
            (path, method, told) for path, methods in self.document["paths"].items() for method, told in methods.items()
        ]
        self.models, self.data_sets = models(), data_sets()
        self.known = self._known()

    def close(self) -> None:
        self.connection.close()

    def run(self, requests: int, seconds: float = float("inf")) -> Found:
        """So many requests, or as many as the seconds allow."""
        found, began = Found(), time.monotonic()
        while found.requests < requests and time.monotonic() - began < seconds:
            self._one(found, self._request(*self.rng.choice(self.operations)))
        return found

    def _one(self, found: Found, request: Request) -> None:
        method = request.operation.split()[0]
        for attempt in (1, 2):
            try:
                self.connection.request(method, request.target, request.body, request.headers)
                answer = self.connection.getresponse()
                body = answer.read()
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.connection.close()
                if attempt == 2:
                    found.finds.append(f"{request.operation} {request.target[:200]}: {type(error).__name__}: {error}")
                    found.answers[request.operation, 0] += 1
                    return
        found.answers[request.operation, answer.status] += 1
        kind = (answer.getheader("content-type") or "").split(";")[0]
        if (problem := self._problem(request, answer.status, kind, body)) is not None:
            sent = f"{request.headers} {request.body[:300] if request.body else b''!r}"
            found.finds.append(f"{request.operation} {request.target[:200]} {sent}: {problem}; {body[:300]!r}")
        if answer.getheader("connection") == "close":
            self.connection.close()

    def _problem(self, request: Request, status: int, kind: str, body: bytes) -> str | None:
        """What is not as the document says; None where all is."""
        if status >= 500 and status != 503:
            return f"status {status}"
        if request.elsewhere and status in (404, 405, 307):
            return None
        told = request.told["responses"].get(str(status))
        if told is None:
            return f"status {status} is not in the document"
        content = told.get("content")
        if request.operation.startswith("HEAD") or not content or not body:
            return None
        if kind not in content and "*/*" not in content:
            return f"{kind} is none of {sorted(content)}"
        if not kind.endswith("json"):
            return None
        return self.schemas.problem(json.loads(body), content[kind].get("schema", {}))

    def _request(self, path: str, method: str, told: Json) -> Request:
        query, headers, elsewhere, target = {}, {}, False, path
        for parameter in told.get("parameters", ()):
            name, where = parameter["name"], parameter["in"]
            if where == "path":
                value = self._id(name)
                elsewhere = elsewhere or "/" in value or value in ("", ".", "..")
                target = target.replace("{" + name + "}", quote(value, safe=""))
            elif parameter.get("required") or self.rng.random() < 0.5:
                value = self._text(parameter.get("schema", {}))
                if where == "query":
                    query[name] = value
                else:
                    headers[name] = "".join(c for c in value if " " <= c <= "~")  # else it is no HTTP
        if self.rng.random() < 0.05:
            query["unknown"] = self._text({})
        body = None
        if "requestBody" in told:
            body, kind = self._body(told["requestBody"]["content"])
            if kind is not None:
                headers["Content-Type"] = kind
        target += "?" + urlencode(query, errors="surrogatepass") if query else ""
        return Request(f"{method.upper()} {path}", told, target, headers, body, elsewhere)

    def _id(self, name: str) -> str:
        known = self.known.get(name, [])
        if known and self.rng.random() < 0.6:
            return self.rng.choice(known)
        return self.rng.choice([*_TEXTS, *(i for ids in self.known.values() for i in ids), "0", "1", str(1 << 70)])

    def _text(self, schema: Json) -> str:
        if self.rng.random() < 0.4:
            return self.rng.choice([*_TEXTS, *(i for ids in self.known.values() for i in ids)])
        value = self.schemas.sample(schema)
        return value if isinstance(value, str) else json.dumps(value)

    def _body(self, content: Json) -> tuple[bytes | None, str | None]:
        kind = self.rng.choice([*content])
        if kind == "application/json":
            value = self.schemas.sample(content[kind].get("schema", {}))
            self._fill_in(value)
            if self.rng.random() < 0.7:
                value = self.schemas.spoiled(value)
            body = json.dumps(value).encode()
            if self.rng.random() < 0.1:
                body = mutated(self.rng, [body, b'{"a": 1e999, "b": NaN}', b"[" * 2000, b"\xff\xfe"])
        else:
            seeds = self.rng.choice((self.models, self.data_sets))
            body = self.rng.choice(seeds) if self.rng.random() < 0.3 else mutated(self.rng, seeds)
            if kind == "multipart/form-data":
                boundary = self.rng.choice(("b", "b", "", "x" * 100))
                kind = f"multipart/form-data; boundary={boundary}"
                head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="m.onnx"\r\n\r\n'
                body = head + body + self.rng.choice((b"\r\n--b--\r\n", b"", b"\r\n--b"))
        if self.rng.random() < 0.05:
            kind = self.rng.choice((None, "text/plain", "application/json; charset=latin-1", "a/b", "application/xml"))
        return body, kind

    def _fill_in(self, value: Any) -> None:
        """Ids of things that there are, mostly: else nothing comes to be looked at."""
        if isinstance(value, dict):
            for name, known in self.known.items():
                if name in value and self.rng.random() < 0.8:
                    value[name] = self.rng.choice(known)

    def _known(self) -> dict[str, list[str]]:
        """One of each kind of thing, as their owner makes them; the job is cancelled, so that its stream has an end."""
        raw = {"Content-Type": "application/octet-stream"}
        model = json.loads(self._plain("POST", "/v1/models?filename=m.onnx", self.models[0], raw))["id"]
        data = json.loads(self._plain("POST", "/v1/datasets?filename=d.npz", self.data_sets[0], raw))["id"]
        as_json = {"Content-Type": "application/json"}
        job = json.loads(self._plain("POST", "/v1/jobs", json.dumps({"model_id": model}).encode(), as_json))["id"]
        self._plain("POST", f"/v1/jobs/{job}/cancel")
        asked = json.dumps({"filename": "m.onnx", "size_bytes": 5 << 20}).encode()
        upload = json.loads(self._plain("POST", "/v1/uploads", asked, as_json))["id"]
        return {"model_id": [model], "dataset_id": [data], "job_id": [job], "upload_id": [upload], "number": ["1"]}

    def _plain(
        self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> bytes:
        self.connection.request(method, target, body, headers or {})
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {target}: {answer.status} {text[:300]!r}")
        return text


def crashes(deployed: Deployment) -> list[str]:
    """Errors in the logs of its processes, each with the lines that follow."""
    found = []
    for log in sorted(deployed.home.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        at = [i for i, line in enumerate(lines) if "Traceback" in line or "internal_error" in line]
        found += ["\n".join(lines[i : i + _LINES_TOLD]) for i in at]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, deployment(Path(folder) / "home", SETTINGS) as deployed:
        with closing(Fuzzer(deployed.port, asked.seed)) as fuzzer:
            found = fuzzer.run(asked.requests, asked.seconds)
        traces = crashes(deployed)
    for (operation, status), count in sorted(found.answers.items()):
        print(f"{count:7} {status} {operation}")
    print(
        f"{found.requests} requests in {time.monotonic() - began:.0f} s, {len(found.finds)} finds, {len(traces)} traces"
    )
    for line in (*found.finds[:50], *traces[:10]):
        print(line)
    return 1 if found.finds or traces else 0


if __name__ == "__main__":
    sys.exit(main())
