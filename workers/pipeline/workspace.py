"""Scratch folders of jobs: one per claim, removed at its end; a killed worker's go at the next start."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.blobs.content import ContentStore, sha256_file
from app.domain.artifact_key import ArtifactRef, FileRef
from workers.artifacts import UNSHARED
from workers.pipeline.folders import remove_tree


@dataclass
class Workspace:
    """`root` holds one folder per fetched artifact (by digest) and one per stage call."""

    root: Path
    tenant_id: str
    content: ContentStore
    calls: int = 0

    def fetch(self, ref: ArtifactRef) -> Path:
        """A folder with the artifact's files; fetched once. Raises `BlobNotFound`."""
        folder = self.root / "artifacts" / ref.digest
        if not folder.exists():
            partial = folder.with_suffix(".part")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for file in ref.files:
                (partial / file.name).parent.mkdir(exist_ok=True)
                self.content.fetch(self.tenant_id, file.sha256, partial / file.name)
                if file.name in UNSHARED.get(ref.kind or "", ()):
                    _unlink_from_store(partial / file.name)
            partial.rename(folder)
        return folder

    def new_call(self, stage: str) -> Path:
        """A fresh folder with `work/` and `out/` for one stage call."""
        self.calls += 1
        folder = self.root / f"{self.calls:03d}-{stage}"
        for name in ("work", "out"):
            (folder / name).mkdir(parents=True)
        return folder

    def store(self, paths: Sequence[Path]) -> ArtifactRef:
        """Hash the files of an output (`answers.plain_files`) and put them in storage."""
        files = []
        for path in paths:
            digest = sha256_file(path)
            files.append(FileRef(path.name, digest, path.stat().st_size))
            self.content.put(self.tenant_id, path, digest)
        return ArtifactRef(tuple(files))

    def store_document(self, name: str, document: dict[str, Any]) -> tuple[str, int]:
        """Put it in storage as JSON: digest and size. By a file of this folder, so that one whose worker is killed
        meanwhile goes with it."""
        raw = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
        digest = hashlib.sha256(raw).hexdigest()
        path = self.root / f"{name}.json"
        path.write_bytes(raw)
        self.content.put(self.tenant_id, path, digest)
        return digest, len(raw)


def _unlink_from_store(path: Path) -> None:
    """Make a hard link a file of its own (`artifacts.UNSHARED`)."""
    if path.stat().st_nlink > 1:
        copy = path.with_suffix(".copy")
        shutil.copyfile(path, copy)
        copy.replace(path)


def work_dir(home: Path) -> Path:
    return home / "work"


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """The lock file `path`, made where there is none; False where another holds it and this one is not to wait."""
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_at(lock.fileno(), path):  # else it was removed by who held it, and others lock a new one
                yield True
                return


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


@contextmanager
def open_workspace(home: Path, name: str, tenant_id: str, content: ContentStore) -> Iterator[Workspace]:
    """A workspace that is gone afterwards. A held lock file keeps `remove_stale` away from it."""
    base = work_dir(home)
    base.mkdir(parents=True, exist_ok=True)
    root = base / name
    with _locked(base / f"{name}.lock", wait=True):
        remove_tree(root)
        root.mkdir()
        try:
            yield Workspace(root, tenant_id, content)
        finally:
            remove_tree(root)
            (base / f"{name}.lock").unlink(missing_ok=True)


def remove_stale(home: Path) -> int:
    """Remove the workspaces of workers that died, with a lock file or without; how many there were."""
    removed = 0
    base = work_dir(home)
    for name in {path.name.removesuffix(".lock") for path in base.iterdir()} if base.exists() else ():
        with contextlib.suppress(OSError), _locked(base / f"{name}.lock", wait=False) as mine:
            if mine:
                remove_tree(base / name)
                (base / f"{name}.lock").unlink(missing_ok=True)
                removed += 1
    return removed
