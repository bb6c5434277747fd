"""A data set of 10 GiB through presigned parts into an S3 server, the client killed in the middle: what the API's
process needs for it, and what the second client sends again.

    python benchmarks/upload.py                # 10 GiB; about five minutes, 21 GiB of disk
    python benchmarks/upload.py --gib 1

The file is a sparse .npz of zeros: nothing of it lies on the disk, all of it goes over the wire and into the server.
The server is OpenStack Swift with its S3 API, the client `anneal_client` in a process of its own, killed by SIGKILL
when half of the parts are there; a second process uploads the same file, and makes the data set of it. The API
completes the upload (joins, checks the SHA-256, stores it under its digest) and looks into the file. Peak memory:
`VmHWM`, reset before.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import boto3
import httpx
from botocore.config import Config

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from _common import GIB, MIB, CannotMeasure, Server, api, execute, parser, say, scratch, table, verdict
from transfer import Memory

from app.db.base import make_engine
from app.db.uow import Database
from app.settings import Settings
from app.tenants import create_key
from tests.swift_server import S3Server, swift

GOAL_MIB = 100
_WIDTH = 1024
_ZEROS = bytes(16 << 20)
_BUCKET = "upload"
_CLIENT = """
import sys
from pathlib import Path
from anneal_client import Client
url, key, path = sys.argv[1:]
with Client(url, key) as client:
    print(client.upload_dataset(Path(path))["id"])
"""


class Sparse(io.FileIO):
    """A file that leaves out blocks of zeros."""

    def write(self, data: Any) -> int:
        if data == _ZEROS:
            self.seek(len(data), os.SEEK_CUR)
            return len(data)
        return super().write(data) or 0


def write_zeros(path: Path, size_bytes: int) -> int:
    """A sparse .npz with one array of about so many bytes; its exact size."""
    blocks = max(1, size_bytes // len(_ZEROS))
    rows = blocks * len(_ZEROS) // (4 * _WIDTH)
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {_WIDTH}), }}".ljust(117) + "\n"
    with (
        Sparse(path, "w") as file,
        zipfile.ZipFile(file, "w") as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
        for _ in range(blocks):
            member.write(_ZEROS)
    return path.stat().st_size


def make_client(storage: S3Server) -> Any:
    options = {"endpoint_url": storage.endpoint_url, "region_name": storage.region}
    options |= {"aws_access_key_id": storage.access_key_id, "aws_secret_access_key": storage.secret_access_key}
    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}), **options)


def environment_of(storage: S3Server) -> dict[str, str]:
    return {
        "STORAGE_URL": f"s3://{_BUCKET}",
        "S3_ENDPOINT_URL": storage.endpoint_url,
        "AWS_ACCESS_KEY_ID": storage.access_key_id,
        "AWS_SECRET_ACCESS_KEY": storage.secret_access_key,
        "ANNEAL_LOG_LEVEL": "WARNING",
    }


class Upload:
    """The upload of one file, by clients that come and go."""

    def __init__(self, server: Server, storage: Any, key: str, source: Path, cache: Path) -> None:
        self._storage = storage
        self._command = [sys.executable, "-c", _CLIENT, server.url, key, str(source)]
        self._environment = {**os.environ, "ANNEAL_CACHE": str(cache), "NO_PROXY": "*"}
        self._notes = cache / "uploads"
        self.http = httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {key}"}, trust_env=False, timeout=60
        )

    def client(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self._command, env=self._environment, stdout=pipe, stderr=pipe, text=True)

    def state(self) -> dict[str, Any] | None:
        """The session, once there is one: its id is what the client notes."""
        for note in self._notes.glob("*") if self._notes.is_dir() else ():
            if upload_id := note.read_text().strip():
                found: dict[str, Any] = self.http.get(f"/v1/uploads/{upload_id}?part_urls=false").json()
                return found
        return None

    def stored(self) -> dict[int, Any]:
        """The parts as the server has them: when each was sent last. None once they are joined."""
        found = {}
        found_there = self._storage.list_multipart_uploads(Bucket=_BUCKET).get("Uploads", [])
        for upload in [upload for upload in found_there if "/uploads/" in upload["Key"]]:  # not of the service's copies
            pages = self._storage.get_paginator("list_parts").paginate(
                Bucket=_BUCKET, Key=upload["Key"], UploadId=upload["UploadId"]
            )
            found |= {part["PartNumber"]: part["LastModified"] for page in pages for part in page.get("Parts", [])}
        return found

    def half(self) -> dict[str, Any]:
        """Send half of it, and be killed."""
        client = self.client()
        while client.poll() is None:
            state = self.state()
            if state is not None and 2 * len(state["received_parts"]) >= state["parts"]:
                client.kill()
                client.wait()
                found = self.state()
                assert found is not None
                return found
            time.sleep(0.2)
        raise CannotMeasure(f"the client ended before it was killed: {client.communicate()[1][-2000:]}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    wanted = int(arguments.gib * GIB)
    # The parts and what is joined of them, as the storage copies it.
    with scratch(arguments.folder, int(2.1 * wanted)) as folder:
        source = folder / "zeros.npz"
        size = write_zeros(source, wanted)
        tempfile.tempdir = str(folder)  # the server's objects, too, are to lie on this disk
        with swift() as storage, api(folder / "home", environment_of(storage)) as server:
            db = Database(make_engine(Settings(home=folder / "home").database))
            key = create_key(db, "local", "benchmark")
            db.close()
            bucket = make_client(storage)
            bucket.create_bucket(Bucket=_BUCKET)
            upload = Upload(server, bucket, key, source, folder / "cache")
            upload.http.get("/v1/models").raise_for_status()
            memory = Memory(server)
            return figures(upload, memory, size, server)


def figures(upload: Upload, memory: Memory, size: int, server: Server) -> dict[str, Any]:
    idle = Memory(server)._read("VmRSS") / MIB
    memory.reset()
    began = time.monotonic()
    state = upload.half()
    half_s, half_mib = time.monotonic() - began, memory.peak_mib()
    kept, parts, first = len(state["received_parts"]), state["parts"], upload.stored()
    say(f"  killed after {half_s:.0f} s, with {kept} of {parts} parts; API +{half_mib:.0f} MiB")
    memory.reset()
    began = time.monotonic()
    client = upload.client()
    sent_s, last = None, first
    while client.poll() is None:
        found, last = upload.state(), upload.stored() or last
        if sent_s is None and found is not None and found["status"] != "open":
            sent_s = time.monotonic() - began
        time.sleep(0.5)
    out, err = client.communicate()
    if client.returncode:
        raise CannotMeasure(f"the second client failed: {err[-3000:]}")
    rest_s, rest_mib = time.monotonic() - began, memory.peak_mib()
    data = upload.http.get(f"/v1/datasets/{out.strip()}").json()
    if data["size_bytes"] != size:
        raise CannotMeasure(f"the data set has {data['size_bytes']} bytes of {size}")
    resent = sum(last[number] != at for number, at in first.items() if number in last)
    sent = kept * state["part_size"] / 1e6
    again = size / 1e6 - sent
    rows = [
        (
            "first client, until it was killed",
            f"{sent:.0f} MB",
            f"{half_s:.0f} s",
            f"{sent / half_s:.0f}",
            f"+{half_mib:.0f} MiB",
        ),
        (
            "second client, the other parts",
            f"{again:.0f} MB",
            f"{sent_s or rest_s:.0f} s",
            f"{again / (sent_s or rest_s):.0f}",
            "",
        ),
        ("… with joining, checking and looking in", "", f"{rest_s:.0f} s", "", f"+{rest_mib:.0f} MiB"),
    ]
    print(
        f"{size / GIB:.2f} GiB in {parts} parts of {state['part_size'] // MIB} MiB; the API idles at {idle:.0f} MiB\n"
    )
    print(table(("what", "sent", "time", "MB/s", "peak of the API above idle"), rows))
    most = max(half_mib, rest_mib)
    print(
        f"\nGoal: < {GOAL_MIB} MiB for the upload: {verdict(most < GOAL_MIB)}. "
        f"Of the {kept} parts {resent} were sent again."
    )
    return {
        "size_bytes": size,
        "parts": parts,
        "kept_parts": kept,
        "sent_again": resent,
        "seconds": {"half": half_s, "rest_sent": sent_s, "rest": rest_s},
        "peak_above_idle_mib": {"half": half_mib, "rest": rest_mib},
        "idle_mib": idle,
    }


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--gib", type=float, default=10.0)
    execute(measure, options.parse_args())
