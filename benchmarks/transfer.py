"""Upload and download of a large file: the service beside bare FastAPI handlers, in turns, on the same disk.

    python benchmarks/transfer.py              # 1 GiB, 5 rounds: about two minutes
    python benchmarks/transfer.py --gib 0.1 --rounds 2

Upload: `POST /v1/models` of an ONNX model (one embedding table of random bytes) beside a handler that streams the body
to a file and through SHA-256. What the service does beyond that is inside its time: looking into the model, making
the file durable (fsync), storing it under its digest, the database. Download: `GET /v1/models/{id}/download` beside
`FileResponse`, both from the page cache. The client runs in a process of its own (sendfile; one reused buffer).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from _common import (
    GIB,
    HERE,
    MIB,
    CannotMeasure,
    Contest,
    Server,
    api,
    bare,
    execute,
    parser,
    say,
    scratch,
    spread,
    table,
    verdict,
)
from onnx import TensorProto, helper

UPLOAD_GOAL, DOWNLOAD_GOAL, MEMORY_GOAL_MIB = 0.80, 0.90, 64
SERVICE = "Anneal"
LOOP, FSYNC, FILE = "bare", "bare with fsync", "bare FileResponse"
TARGETS = {LOOP: "/upload", FSYNC: "/upload?fsync=1"}
_WIDTH = 1024
_BLOCK = 16 << 20


def write_model(path: Path, size_bytes: int) -> int:
    """A valid ONNX model whose only weight is a table of about `size_bytes` random (incompressible) bytes; the size
    of the file. Written as a stream, field by field, because the table is larger than what should be in memory."""
    rows = max(1, size_bytes // (4 * _WIDTH))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 8])
    out = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 8, _WIDTH])
    graph = helper.make_graph([helper.make_node("Gather", ["table", "ids"], ["embedding"])], "lookup", [ids], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model.ClearField("graph")
    tensor = TensorProto(dims=[rows, _WIDTH], data_type=TensorProto.FLOAT, name="table").SerializeToString()
    data_bytes = rows * _WIDTH * 4
    # Length-delimited fields, inside out: TensorProto.raw_data 9, GraphProto.initializer 5, ModelProto.graph 7.
    tensor += _field(9, data_bytes)
    initializer = _field(5, len(tensor) + data_bytes)
    head = graph.SerializeToString() + initializer + tensor
    with path.open("wb") as file:
        file.write(model.SerializeToString() + _field(7, len(head) + data_bytes) + head)
        left = data_bytes
        while left:
            left -= file.write(os.urandom(min(left, _BLOCK)))
    return path.stat().st_size


def _field(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited protobuf field."""
    out = bytearray([number << 3 | 2])
    while length > 127:
        out.append(length & 127 | 128)
        length >>= 7
    return bytes([*out, length])


def request(server: Server, method: str, target: str, **options: Any) -> dict[str, Any]:
    """One request by the client process; its answer with the seconds that it took."""
    arguments = json.dumps({"port": server.port, "method": method, "target": target, **options})
    done = subprocess.run(
        [sys.executable, str(HERE / "_http_client.py"), arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotMeasure(f"{method} {target}: {done.stderr.strip().splitlines()[-1:]}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if answer["status"] >= 400:
        raise CannotMeasure(f"{method} {target} answered {answer['status']}: {answer['body'][:500]}")
    return answer


class Memory:
    """Peak resident memory of a process above what it had when this was made, in MiB."""

    def __init__(self, server: Server) -> None:
        self._pid = server.pid
        self._idle = self._read("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        try:
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        except OSError as error:
            raise CannotMeasure(f"peak memory cannot be reset on this machine ({error})") from error

    def peak_mib(self) -> float:
        return (self._read("VmHWM") - self._idle) / MIB

    def _read(self, name: str) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise CannotMeasure(f"/proc/{self._pid}/status has no {name}")


@dataclass
class Figures:
    upload: Contest
    download: Contest
    memory: dict[str, list[float]] = field(default_factory=dict)

    def note_memory(self, name: str, mib: float) -> None:
        self.memory.setdefault(name, []).append(mib)


def warm_up(service: Server, peer: Server, folder: Path) -> None:
    """One small file each way, so that nobody is measured importing a module."""
    small = folder / "small.onnx"
    write_model(small, MIB)
    model = json.loads(request(service, "POST", "/v1/models?filename=small.onnx", file=str(small))["body"])
    request(service, "GET", f"/v1/models/{model['id']}/download")
    httpx.delete(f"{service.url}/v1/models/{model['id']}").raise_for_status()
    for target in TARGETS.values():
        request(peer, "POST", target, file=str(small))
    (folder / "upload").unlink()
    small.unlink()


def uploads(service: Server, peer: Server, folder: Path, source: Path, rounds: int, figures: Figures) -> None:
    size = source.stat().st_size
    memory = {SERVICE: Memory(service), **{name: Memory(peer) for name in TARGETS}}

    def measure(name: str) -> float:
        os.sync()  # nobody pays for what the one before has left to be written
        memory[name].reset()
        server = service if name == SERVICE else peer
        target = "/v1/models?filename=large.onnx" if name == SERVICE else TARGETS[name]
        answer = request(server, "POST", target, file=str(source))
        figures.note_memory(f"upload, {name}", memory[name].peak_mib())
        body = json.loads(answer["body"])
        if body["size_bytes"] != size:
            raise CannotMeasure(f"{name} took {body['size_bytes']} bytes of {size}")
        if name == SERVICE:
            httpx.delete(f"{server.url}/v1/models/{body['id']}", timeout=60).raise_for_status()
        else:
            (folder / "upload").unlink()
        say(f"  upload    {name:<20} {size / 1e6 / answer['seconds']:7.0f} MB/s")
        return float(size / 1e6 / answer["seconds"])

    figures.upload.run(rounds, measure)


def downloads(service: Server, peer: Server, source: Path, rounds: int, figures: Figures) -> list[list[str]]:
    """Answers what If-None-Match got: rows of a table."""
    size = source.stat().st_size
    answer = request(service, "POST", "/v1/models?filename=large.onnx", file=str(source))
    model_id = json.loads(answer["body"])["id"]
    targets = {SERVICE: (service, f"/v1/models/{model_id}/download"), FILE: (peer, "/file")}
    etags = {name: request(server, "GET", target)["headers"].get("etag") for name, (server, target) in targets.items()}
    memory = {SERVICE: Memory(service), FILE: Memory(peer)}

    def measure(name: str) -> float:
        server, target = targets[name]
        memory[name].reset()
        found = request(server, "GET", target)
        figures.note_memory(f"download, {name}", memory[name].peak_mib())
        if found["body_bytes"] != size:
            raise CannotMeasure(f"{name} sent {found['body_bytes']} bytes of {size}")
        say(f"  download  {name:<20} {size / 1e6 / found['seconds']:7.0f} MB/s")
        return float(size / 1e6 / found["seconds"])

    figures.download.run(rounds, measure)
    rows = []
    for name, (server, target) in targets.items():
        found = request(server, "GET", target, headers={"If-None-Match": etags[name] or '"none"'})
        rows.append([name, str(found["status"]), str(found["body_bytes"]), f"{1000 * found['seconds']:.1f} ms"])
    httpx.delete(f"{service.url}/v1/models/{model_id}", timeout=60).raise_for_status()
    return rows


def speed_rows(contest: Contest, peers: list[str], goal: float, what: str) -> list[list[str]]:
    """The first peer is the one that the goal speaks of; the others explain."""
    rows = []
    for i, peer in enumerate(peers):
        ratio = contest.ratio(SERVICE, peer)
        judged = [f"≥ {100 * goal:.0f} %", verdict(ratio.median >= goal)] if i == 0 else ["–", "–"]
        mine, other = (spread(contest.values[name]) for name in (SERVICE, peer))
        rows.append([f"{what}, MB/s, beside {peer}", mine, other, str(ratio), *judged])
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = int(arguments.gib * GIB)
    figures = Figures(Contest([SERVICE, *TARGETS]), Contest([SERVICE, FILE]))
    # The source, the service's copy and the peer's copy.
    with scratch(arguments.folder, 3 * wanted) as folder:
        source = folder / "file"
        size = write_model(source, wanted)
        say(f"{size / GIB:.3f} GiB, {arguments.rounds} rounds")
        with (
            api(folder / "home") as service,
            bare("transfer", "--folder", str(folder), log=folder / "bare.log") as peer,
        ):
            warm_up(service, peer, folder)
            uploads(service, peer, folder, source, arguments.rounds, figures)
            conditional = downloads(service, peer, source, arguments.rounds, figures)
    rows = speed_rows(figures.upload, [LOOP, FSYNC], UPLOAD_GOAL, "upload")
    rows += speed_rows(figures.download, [FILE], DOWNLOAD_GOAL, "download")
    for what, peer_name in (("upload", LOOP), ("download", FILE)):
        mine, other = figures.memory[f"{what}, {SERVICE}"], figures.memory[f"{what}, {peer_name}"]
        judged = [f"< +{MEMORY_GOAL_MIB} MiB", verdict(max(mine) < MEMORY_GOAL_MIB)] if what == "upload" else ["–", "–"]
        values = [f"+{max(v):.0f} MiB" for v in (mine, other)]
        rows.append([f"peak memory above idle, {what}", *values, "–", *judged])
    title = f"{size / GIB:.2f} GiB, {arguments.rounds} rounds in turns; median (min–max); ratios round by round"
    print(f"{title}\n")
    print(table(["what", SERVICE, "bare", "ratio", "goal", "verdict"], rows), end="\n\n")
    print(table(["GET with If-None-Match", "status", "body bytes", "time"], conditional))
    return {
        "size_bytes": size,
        "upload_mb_s": figures.upload.values,
        "upload_ratio": {name: figures.upload.ratio(SERVICE, name).to_json() for name in TARGETS},
        "download_mb_s": figures.download.values,
        "download_ratio": figures.download.ratio(SERVICE, FILE).to_json(),
        "peak_memory_above_idle_mib": figures.memory,
        "if_none_match": conditional,
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=1.0, help="size of the file (default: 1; at most 1.9)")
    options.add_argument("--rounds", type=int, default=5)
    execute(measure, options.parse_args())
