"""Scratch folders of jobs: those of dead workers go, with a lock file or without; those in use never do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import psutil

from app.domain.artifact_key import ArtifactRef, FileRef
from workers.artifacts import ONNX
from workers.pipeline.workspace import Workspace, open_workspace, remove_stale, work_dir

CONTENT = cast("Any", None)

# Dies in its workspace.
WORKER = """
import os, signal, sys
from pathlib import Path
from workers.pipeline.workspace import open_workspace
with open_workspace(Path(sys.argv[1]), "killed", "t", None) as workspace:
    (workspace.root / "file").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""

# Dies while its report goes to the storage.
PUBLISHER = """
import os, signal, sys
from pathlib import Path
from app.blobs.content import ContentStore
from workers.pipeline.workspace import open_workspace
class Storage:
    def local_path(self, key): return None
    def size(self, key): return None
    def put_file(self, key, path, **how):
        assert path.read_bytes() == b'{"a":1}'
        os.kill(os.getpid(), signal.SIGKILL)
with open_workspace(Path(sys.argv[1]), "killed", "t", ContentStore(Storage())) as workspace:
    workspace.store_document("report", {"a": 1})
"""


def test_a_report_goes_with_the_worker_that_was_killed_while_it_stored_it(tmp_path: Path) -> None:
    """A soak of 200 faults found one that stayed for ever."""
    command = [sys.executable, "-c", PUBLISHER, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(tmp_path.rglob("*.json"))
    assert remove_stale(tmp_path) == 1
    assert not any(p.is_file() for p in tmp_path.rglob("*"))


def test_what_dead_workers_left_goes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WORKER, str(tmp_path)], cwd=Path(__file__).parents[2], check=False)
    base = work_dir(tmp_path)
    assert (base / "killed" / "file").exists()
    (base / "without-a-lock" / "deep").mkdir(parents=True)
    (base / "without-a-folder.lock").touch()
    with open_workspace(tmp_path, "living", "t", CONTENT) as living:
        assert remove_stale(tmp_path) == 3
        assert sorted(p.name for p in base.iterdir()) == ["living", "living.lock"]
        assert living.root.is_dir()
    assert remove_stale(tmp_path) == 0
    assert [*base.iterdir()] == []
    assert remove_stale(tmp_path / "none") == 0


def test_a_workspace_that_is_just_made_or_left_is_nobodys_prey(tmp_path: Path) -> None:
    ended = threading.Event()
    errors: list[BaseException] = []

    def clean() -> None:
        try:
            while not ended.is_set():
                remove_stale(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=clean) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            with open_workspace(tmp_path, f"job-{number % 2}", "t", CONTENT) as workspace:
                (workspace.root / "file").write_text(str(number))
                assert (workspace.root / "file").read_text() == str(number)
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert not [f for f in psutil.Process().open_files() if f.path.startswith(str(tmp_path))]


def test_external_data_of_an_onnx_model_has_no_second_link(tmp_path: Path) -> None:
    """onnx takes one for an attack; what else lies in the store is shared with it."""
    stored = {name: tmp_path / f"stored-{name}" for name in ("model.onnx", "model.onnx.data")}
    for path in stored.values():
        path.write_bytes(b"weights")

    class Store:
        def fetch(self, _: str, sha256: str, target: Path) -> None:
            os.link(stored[sha256], target)

    files = tuple(FileRef(name, name, 7) for name in stored)
    for kind, links in ((ONNX, 1), ("another-kind", 2)):
        folder = Workspace(tmp_path / kind, "t", cast("Any", Store())).fetch(ArtifactRef(files, kind))
        assert (folder / "model.onnx.data").stat().st_nlink == links
        assert (folder / "model.onnx").stat().st_nlink > 1
        assert (folder / "model.onnx.data").read_bytes() == b"weights"
