"""A file that goes, or gives way to another, while it is looked into is no fault of its sender's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from app.blobs.content import ContentStore, sha256_file
from app.library import local_copy
from app.settings import LimitSettings
from app.storage.local import LocalStore

_TENANT = "tnt_1"


def test_another_upload_of_the_same_bytes_leaves_the_copy_alone(tmp_path: Path) -> None:
    content = ContentStore(LocalStore(tmp_path / "blobs"))
    file = tmp_path / "file"
    file.write_bytes(b"content")
    sha256 = sha256_file(file)
    content.put(_TENANT, file, sha256)
    with local_copy(content, _TENANT, sha256, tmp_path / "tmp") as path:
        before = path.stat().st_ino
        content.put(_TENANT, file, sha256, trusted=False)
        assert path.stat().st_ino == before
        assert path.read_bytes() == b"content"
    assert [*(tmp_path / "tmp").iterdir()] == []


def test_a_file_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    limits = LimitSettings()
    request = {
        "kind": "model",
        "path": str(tmp_path / "gone.onnx"),
        "scratch": str(tmp_path),
        "filename": "gone.onnx",
        "limits": {
            "unpacked_bytes": limits.unpacked_bytes,
            "archive_members": limits.archive_members,
            "compression_ratio": limits.compression_ratio,
        },
        "cpu_s": 10,
        "memory_bytes": limits.inspect_memory_mb << 20,
    }
    command = [sys.executable, "-m", "app.inspection.child"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        answer = child.stdout.readline()  # its input stays open meanwhile: the pool is there
        child.stdin.close()
    assert json.loads(answer) == {"ended": 0}, "which the pool answers with: try again"
