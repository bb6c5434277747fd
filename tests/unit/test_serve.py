"""`serve.py` of a bundle as a process: the Open Inference Protocol over HTTP, its limits, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.factories.serving import FAILS, WAITS, bundle
from workers.backends.bundle_script import infer_script
from workers.serving import v2
from workers.serving.serving_settings import InvalidRequest


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    def ask(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, data, {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def infer(self, body: bytes | dict[str, Any], **headers: str) -> tuple[int, Any]:
        status, _, answer = self.ask("POST", "/v2/models/doubling/infer", body, **headers)
        return status, json.loads(answer)

    def metrics(self) -> dict[tuple[str, ...], float]:
        text = self.ask("GET", "/metrics")[2].decode()
        families = text_string_to_metric_families(text)
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


@contextmanager
def serving(folder: Path, *arguments: str, wait: bool = True) -> Iterator[Server]:
    command = [sys.executable, "-I", str(folder / "serve.py"), "--port", "0", *arguments]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline() if wait else ""
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found or not wait, (line, process.stderr and process.stderr.read())
        yield Server(process, int(found[1]) if found else 0)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = bundle(tmp_path_factory.mktemp("bundle"), max_batch=8, queue_limit=3)
    with serving(folder, "--max-request-mb", "0.1") as found:
        yield found


def asked(values: Any, shape: list[int], datatype: str = "INT64", **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": values}], **more}


def test_health_and_metadata(server: Server) -> None:
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/doubling/ready",
        "/v2/models/doubling/versions/1/ready",
    ):
        assert server.ask("GET", path)[0] == 200
    assert json.loads(server.ask("GET", "/v2")[2])["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/models/doubling", "/v2/models/doubling/versions/1"):
        assert json.loads(server.ask("GET", path)[2]) == {
            "name": "doubling",
            "versions": ["1"],
            "platform": "numpy",
            "inputs": [{"name": "x", "datatype": "INT64", "shape": [-1, -1]}],
            "outputs": [
                {"name": "y", "datatype": "INT64", "shape": [-1, -1]},
                {"name": "width", "datatype": "INT64", "shape": [-1]},
            ],
        }


def test_infer_with_json(server: Server) -> None:
    for data in ([1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]]):
        status, answer = server.infer(asked(data, [2, 3], id="mine", outputs=[{"name": "y"}]))
        assert status == 200
        y = {"name": "y", "datatype": "INT64", "shape": [2, 3], "data": [3, 5, 7, 9, 11, 13]}
        assert answer == {"model_name": "doubling", "model_version": "1", "id": "mine", "outputs": [y]}


def test_infer_with_binary_tensors(server: Server) -> None:
    x = np.arange(6, dtype=np.int64).reshape(2, 3)
    told = {"name": "x", "shape": [2, 3], "datatype": "INT64", "parameters": {"binary_data_size": x.nbytes}}
    head = {"inputs": [told], "outputs": [{"name": "width"}, {"name": "y", "parameters": {"binary_data": True}}]}
    text = json.dumps(head).encode()
    status, headers, body = server.ask(
        "POST", "/v2/models/doubling/infer", text + x.tobytes(), Inference_Header_Content_Length=str(len(text))
    )
    assert status == 200
    length = int(headers["inference-header-content-length"])
    width, y = json.loads(body[:length])["outputs"]
    assert width["data"] == [3, 3]
    assert y["parameters"] == {"binary_data_size": x.nbytes}
    np.testing.assert_array_equal(np.frombuffer(body[length:], np.int64).reshape(2, 3), 2 * x + 1)


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        (b"{", 400, "invalid_request", "no JSON"),
        ({"inputs": 3}, 400, "invalid_request", "list `inputs`"),
        (asked([1], [1, 2]), 400, "invalid_request", "do not fill"),
        (asked([1, 2], [1, 2], "INT32"), 400, "invalid_request", "is int32, the model's is int64"),
        (asked([1, 2], [1, 2], "STRING"), 400, "invalid_request", "datatype 'STRING'"),
        (asked([1.5, 2], [1, 2]), 400, "invalid_request", "holds float64"),
        (asked([1, 2], [2]), 400, "invalid_request", "has the shape [2]"),
        (asked([1, 2], [1, 2], outputs=[{"name": "z"}]), 400, "invalid_request", "there is no output z"),
        (asked([1, 2], [1, 2], parameters={"timeout": -3}), 400, "invalid_request", "timeout"),
        (asked([FAILS, 2], [1, 2]), 500, "inference_failed", "this one fails"),
        (asked([WAITS, 2], [1, 2], parameters={"timeout": 20_000}), 504, "deadline_exceeded", "while it ran"),
        (asked([1] * 60_000, [1, 60_000]), 413, "too_large", "100000 are taken"),
    ],
)
def test_errors_are_typed(server: Server, body: Any, status: int, code: str, words: str) -> None:
    found, answer = server.infer(body)
    assert (found, answer["code"]) == (status, code)
    assert words in answer["error"]


def test_what_is_not_there(server: Server) -> None:
    for method, path, code in (
        ("GET", "/", "not_found"),
        ("GET", "/v2/models/other", "unknown_model"),
        ("POST", "/v2/models/doubling/versions/2/infer", "unknown_version"),
        ("DELETE", "/v2/models/doubling", "not_found"),
    ):
        status, _, body = server.ask(method, path)
        assert (status, json.loads(body)["code"]) == (404, code)
    assert server.infer(b"", Content_Encoding="gzip")[0] == 415
    assert server.infer(b"{}", Inference_Header_Content_Length="x")[0] == 400
    assert server.infer(b"{}", Inference_Header_Content_Length="99")[0] == 400


def test_a_full_queue_answers_503_and_when_to_come_again(server: Server) -> None:
    slow = asked([WAITS], [1, 1])

    def one(_: int) -> tuple[int, str | None]:
        status, headers, _ = server.ask("POST", "/v2/models/doubling/infer", slow)
        return status, headers.get("retry-after")

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    assert {status for status, _ in found} == {200, 503}
    assert all((status == 503) == (retry is not None and int(retry) >= 1) for status, retry in found)


SLOW = """
import time

import numpy as np


def load(threads=None):
    def run(feeds):
        time.sleep(0.04)
        return {"y": 2 * feeds["x"] + 1, "width": np.zeros(len(feeds["x"]), np.int64)}

    return ["x"], run
"""


@pytest.mark.parametrize("named", [True, False])
def test_whoever_asks_without_end_keeps_no_other_caller_waiting(named: bool, tmp_path: Path) -> None:
    """Callers are told apart by the header that names them; without it all of one address are one, and wait for all
    that came before."""
    folder = bundle(tmp_path / "bundle", SLOW, max_batch=1, queue_limit=64 if named else 256)
    ended: list[tuple[str, int]] = []

    def one(caller: str) -> None:
        status, _, _ = server.ask("POST", "/v2/models/doubling/infer", asked([1], [1, 1]), X_Caller=caller)
        ended.append((caller, status))

    header = ["--caller-header", "X-Caller"] if named else []
    with serving(folder, *header) as server, ThreadPoolExecutor(88) as pool:
        asking = [pool.submit(one, "greedy") for _ in range(80)]
        until = time.monotonic() + 30
        while (waiting := server.metrics()["anneal_serve_waiting",]) < 40 and time.monotonic() < until:
            time.sleep(0.005)
        asking += [pool.submit(one, f"other {n}") for n in range(8)]
        for request in asking:
            request.result(60)
    others = [status for caller, status in ended if caller != "greedy"]
    assert others == 8 * [200], "the newest of whoever holds most makes room where the queue is full"
    served = [caller == "greedy" for caller, status in ended if status == 200]
    if named:
        assert sum(served[len(served) - served[::-1].index(False) :]) >= 20, (
            "whom the last of the others did not wait for"
        )
    else:
        assert sum(served[: served.index(False)]) >= waiting


def test_who_hangs_up_is_not_computed(server: Server) -> None:
    before = server.metrics()

    def gone() -> None:
        body = json.dumps(asked([WAITS], [1, 1])).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            head = f"POST /v2/models/doubling/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            time.sleep(0.05)

    threads = [threading.Thread(target=gone) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    key = ("anneal_serve_requests_total", "cancelled")
    until = time.monotonic() + 60
    while server.metrics().get(key, 0) < before.get(key, 0) + 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert server.metrics()[key] == before.get(key, 0) + 2
    assert server.infer(asked([1], [1, 1]))[0] == 200


def test_metrics_count_what_was_done(server: Server) -> None:
    before = server.metrics()
    for _ in range(3):
        assert server.infer(asked([1, 2], [2, 1]))[0] == 200
    after = server.metrics()
    grown = {k: v - before.get(k, 0) for k, v in after.items()}
    assert grown["anneal_serve_requests_total", "ok"] == 3
    sizes = [grown["anneal_serve_batch_size_bucket", bound] for bound in ("1", "2", "1024", "+Inf")]
    assert sizes == [0, 3, 3, 3]
    assert grown["anneal_serve_batch_size_sum",] == 6
    assert grown["anneal_serve_request_seconds_count",] == 3
    assert grown["anneal_serve_queue_seconds_bucket", "+Inf"] == 3
    assert after["anneal_serve_instances_up",] == 1
    assert after["anneal_serve_queue_limit",] == 3


def test_the_metrics_do_not_grow_with_the_sizes_of_batches(server: Server) -> None:
    for rows in range(1, 9):
        assert server.infer(asked([1] * rows, [rows, 1]))[0] == 200
    bounds = {key[1] for key in server.metrics() if key[0] == "anneal_serve_batch_size_bucket"}
    assert bounds == {*(str(2**n) for n in range(11)), "+Inf"}


def test_sigterm_answers_what_was_taken(tmp_path: Path) -> None:
    with serving(bundle(tmp_path, max_batch=1)) as server, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(server.infer, asked([WAITS], [1, 1])) for _ in range(3)]
        until = time.monotonic() + 60
        taken = ("anneal_serve_waiting", "anneal_serve_in_flight")
        while sum(server.metrics()[name,] for name in taken) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(server.process.pid, signal.SIGTERM)
        assert [a.result()[0] for a in answers] == [200, 200, 200]
        assert server.process.wait(10) == 0
        with pytest.raises(OSError):
            server.ask("GET", "/v2/health/live")


def test_it_lives_before_it_is_ready(tmp_path: Path) -> None:
    """A large engine loads for minutes; what restarts it must not take it for dead."""
    folder = bundle(tmp_path, "import time\n\n\ndef load():\n    time.sleep(1)\n    return ['x'], dict\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(folder, "--port", str(port), wait=False) as found:
        server = Server(found.process, port)
        until = time.monotonic() + 60
        while True:
            try:
                live = server.ask("GET", "/v2/health/live")[0]
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(0.02)
        assert (live, server.ask("GET", "/v2/health/ready")[0]) == (200, 503)
        status, answer = server.infer(asked([1], [1, 1]))
        assert (status, answer["code"]) == (503, "not_ready")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(10) == 0


def test_an_engine_that_takes_no_number_of_threads_runs_with_its_own(tmp_path: Path) -> None:
    """A backend of another package may have written its `load` without."""
    loader = "def load():\n    return ['x'], lambda feeds: {'y': 2 * feeds['x'], 'width': feeds['x'][:, 0]}\n"
    script = infer_script(library="numpy", imports="", loader=loader)
    with serving(bundle(tmp_path, script, instances=2, threads=1)) as server:
        status, _ = server.infer(asked([1], [1, 1]))
    assert status == 200


def test_an_engine_that_does_not_start_ends_it(tmp_path: Path) -> None:
    folder = bundle(tmp_path, "def load():\n    raise OSError('no such library')\n")
    command = [sys.executable, str(folder / "serve.py"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "no such library" in done.stderr) == (1, True)
    (folder / "serving.json").write_text('{"max_batch": 0}')
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (1, "max_batch is 0: give a whole number from 1 to 65536\n")


@pytest.mark.parametrize("dtype", sorted(set(v2.DATATYPES) - {"bfloat16"}))
def test_every_type_goes_there_and_back(dtype: str) -> None:
    array = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    ask = v2.Asked({}, None, True, None, None)
    for binary in (True, False):
        ask = v2.Asked({}, {"a": binary}, False, None, None)
        pieces, length = v2.encode("m", ask, {"a": array})
        body = b"".join(pieces)
        told = json.loads(body if length is None else body[:length])
        told["inputs"] = told.pop("outputs")
        text = json.dumps(told).encode()
        tail = b"" if length is None else body[length:]
        found = v2.decode(text + tail, None if length is None else len(text)).feeds["a"]
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, array)


def test_a_large_request_comes_whole(tmp_path: Path) -> None:
    x = np.arange(75_264, dtype=np.int64).reshape(1, -1)  # 588 KiB
    told = {"name": "x", "shape": [*x.shape], "datatype": "INT64", "parameters": {"binary_data_size": x.nbytes}}
    text = json.dumps({"inputs": [told], "parameters": {"binary_data_output": True}}).encode()
    as_json = json.dumps(asked(x.tolist(), [*x.shape], outputs=[{"name": "y"}])).encode()
    with serving(bundle(tmp_path, max_batch=8)) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for _ in range(3):  # on one connection
            headers = {"Inference-Header-Content-Length": str(len(text))}
            connection.request("POST", "/v2/models/doubling/infer", text + x.tobytes(), headers)
            answer = connection.getresponse()
            head, body = int(answer.headers["Inference-Header-Content-Length"]), answer.read()
            sizes = [o["parameters"]["binary_data_size"] for o in json.loads(body[:head])["outputs"]]
            np.testing.assert_array_equal(np.frombuffer(body, np.int64, sizes[0] // 8, head), 2 * x[0] + 1)
            connection.request("POST", "/v2/models/doubling/infer", as_json)
            found = json.loads(connection.getresponse().read())
            np.testing.assert_array_equal(found["outputs"][0]["data"], 2 * x[0] + 1)
        connection.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what becomes of freed memory is the C library's")
def test_the_memory_of_large_requests_is_used_again(tmp_path: Path) -> None:
    """Without that each costs a fault of every page: 147 for each array on its way."""
    x = np.ones((1, 75_264), np.int64)
    told = {"name": "x", "shape": [*x.shape], "datatype": "INT64", "parameters": {"binary_data_size": x.nbytes}}
    text = json.dumps({"inputs": [told], "parameters": {"binary_data_output": True}}).encode()

    def faults() -> int:
        """Of the server and of the process of its engine."""
        found = psutil.Process(server.process.pid)
        stats = [Path(f"/proc/{p.pid}/stat").read_text().rpartition(")")[2] for p in (found, *found.children())]
        return sum(int(stat.split()[7]) for stat in stats)

    with serving(bundle(tmp_path, max_batch=8)) as server:
        seen = []
        for _ in range(3):
            before = faults()
            for _ in range(10):
                length = {"Inference_Header_Content_Length": str(len(text))}
                assert server.ask("POST", "/v2/models/doubling/infer", text + x.tobytes(), **length)[0] == 200
            seen.append((faults() - before) / 10)
    assert min(seen) < 50, seen


@pytest.mark.parametrize("quick", [True, False])
def test_json_is_read_alike_with_and_without_the_quick_library(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if quick:
        pytest.importorskip("orjson")
    else:
        monkeypatch.setattr(v2, "orjson", None)
    values = [0.1, -2.5e30, 3, 1e-45]
    told = {"inputs": [{"name": "a", "shape": [4], "datatype": "FP32", "data": values}], "id": "ü"}
    for text in (json.dumps(told).encode(), json.dumps(told, ensure_ascii=False).encode()):
        for body in (text, memoryview(text)):
            asked = v2.decode(body, None)
            np.testing.assert_array_equal(asked.feeds["a"], np.array(values, np.float32))
            assert asked.id == "ü"
    odd = b'{"inputs": [{"name": "a", "shape": [3], "datatype": "FP32", "data": [NaN, Infinity, -Infinity]}]}'
    found = v2.decode(odd, None).feeds["a"]
    np.testing.assert_array_equal(found, np.array([np.nan, np.inf, -np.inf], np.float32))
    (answer,), length = v2.encode("m", v2.Asked({}, None, False, None, None), {"a": found, "b": np.float64([[0.1]])})
    assert length is None
    first, second = json.loads(answer)["outputs"]
    assert [str(v) for v in first["data"]] == ["nan", "inf", "-inf"]
    assert (second["data"], second["shape"]) == ([0.1], [1, 1])
    with pytest.raises(InvalidRequest, match="no JSON"):
        v2.decode(b'{"inputs": [}', None)
    with pytest.raises(InvalidRequest, match="no JSON"):
        v2.decode(b"[" * 100_000, None)


@pytest.mark.parametrize("size", [-1, 0, 5, 23, 25, 10**9, "24", True, 1.5])
def test_binary_sizes_that_lie(size: Any) -> None:
    told = {"name": "x", "shape": [1, 3], "datatype": "INT64", "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [told]}).encode()
    with pytest.raises(InvalidRequest):
        v2.decode(text + bytes(24), len(text))


def test_heads_that_repeat_are_read_once_and_say_the_same() -> None:
    def asked(*inputs: dict[str, Any], **more: Any) -> bytes:
        return json.dumps({"inputs": inputs, **more}).encode()

    def tensor(name: str, shape: list[int], datatype: str, size: int) -> dict[str, Any]:
        return {"name": name, "shape": shape, "datatype": datatype, "parameters": {"binary_data_size": size}}

    a, b = tensor("a", [2, 2], "FP32", 16), tensor("b", [3], "INT64", 24)
    plain = {"name": "c", "shape": [1], "datatype": "INT32", "data": [7]}
    wanted = [{"name": "out", "parameters": {"binary_data": True}}]
    heads = [
        asked(a, b), asked(b, a), asked(a, plain, b), asked(a, b, id="one"), asked(tensor("a", [0, 4], "FP32", 0)),
        asked(a, b, outputs=wanted, parameters={"binary_data_output": True, "timeout": 5_000_000}),
        asked(a, b, parameters={"note": "x" * 5000}),
    ]  # fmt: skip
    for text in heads * 3:
        size = sum(t["parameters"]["binary_data_size"] for t in json.loads(text)["inputs"] if "parameters" in t)
        body = text + os.urandom(size)
        found, again = v2.decode(body, len(text)), v2._decoded(memoryview(body), len(text))[0]
        assert [*found.feeds] == [*again.feeds]
        for name, array in found.feeds.items():
            assert (array.dtype, array.shape) == (again.feeds[name].dtype, again.feeds[name].shape)
            assert array.tobytes() == again.feeds[name].tobytes()
        kept = (found.outputs, found.binary, found.id, found.timeout_s)
        assert kept == (again.outputs, again.binary, again.id, again.timeout_s)
        with pytest.raises(InvalidRequest, match="follow the last"):
            v2.decode(body + b"x", len(text))
        if size:
            with pytest.raises(InvalidRequest, match="ends after the body"):
                v2.decode(body[:-1], len(text))
    assert {heads[0], heads[1], heads[5]} <= v2._heads.keys()
    assert not {heads[2], heads[3], heads[6]} & v2._heads.keys(), "numbers in JSON, an id, long ones"
    for width in range(2 * v2._KEPT):
        text = asked(tensor("a", [width], "INT8", width))
        assert v2.decode(text + bytes(width), len(text)).feeds["a"].shape == (width,)
        (head, tail), length = v2.encode("m", v2.Asked({}, None, True, None, None), {"o": np.zeros(width, np.int8)})
        assert json.loads(head)["outputs"][0]["shape"] == [width]
        assert (len(head), len(tail)) == (length, width)
    assert len(v2._heads) <= v2._KEPT
    assert len(v2._answers) <= v2._KEPT
    with pytest.raises(InvalidRequest, match="the protocol has not"):
        v2.encode("m", v2.Asked({}, None, True, None, None), {"o": np.array(["text"])})
