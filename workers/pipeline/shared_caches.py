"""Caches that all workers share through storage: what TensorRT measured of its tactics on one kind of GPU.

A cache is `NAME.cache` in the installation's cache folder; what other machines found is laid beside it, into
`NAME.others/`, and the backend merges that in at the next build. Objects in storage never change, so each state of a
cache is one of its own, `shared/caches/NAME/SHA256`. Who stores a state removes those that it was merged from. Nobody
waits for anybody, and nothing is lost: two who store at once leave two objects, which the next build merges.

A cache saves time and decides nothing: where storage is away the build goes on without. It lies outside of every
tenant's files, and holds no more of a model than how long kernels of some shape take.
"""

from __future__ import annotations

import re
from pathlib import Path

import structlog

from app.blobs.content import sha256_file
from app.errors import AppError
from app.storage.base import BlobNotFound, BlobStore, StoredObject
from workers.installation import CACHE, LARGEST_CACHE, OTHERS

log = structlog.get_logger(__name__)

PREFIX = "shared/caches/"
_KEY = re.compile(re.escape(PREFIX) + r"([A-Za-z0-9-]{1,80})/([0-9a-f]{64})")
_MOST = 32  # states of one cache that are looked at; more are there only after many crashes
_TROUBLE = (AppError, BlobNotFound, OSError)


class SharedCaches:
    """Of one worker process. Other processes of its machine may use the same folder."""

    def __init__(self, storage: BlobStore, folder: Path) -> None:
        self._storage = storage
        self._folder = folder
        self._known: dict[str, set[str]] = {}  # name → states in storage that this machine has merged, or is about to

    def pull(self) -> None:
        """Lay beside the local caches what is in storage and not known here yet."""
        try:
            for name, digest, found in self._stored():
                known = self._known.setdefault(name, set())
                if digest in known or found.size_bytes > LARGEST_CACHE:
                    continue
                if digest == self._local(name):  # stored by a worker of this machine, before this process began
                    known.add(digest)
                    continue
                target = self._folder / f"{name}{OTHERS}" / digest
                self._storage.fetch(found.key, target)
                if sha256_file(target) != digest:  # not what some worker stored
                    target.unlink()
                known.add(digest)
        except _TROUBLE as error:
            log.warning("shared_cache_not_read", reason=str(error))

    def push(self) -> None:
        """Store the local caches that have changed, and remove the states that are part of them."""
        for path in sorted(self._folder.glob(f"*{CACHE}")):
            name = path.stem
            if path.is_symlink() or not path.is_file() or not _KEY.fullmatch(f"{PREFIX}{name}/{'0' * 64}"):
                continue  # a build made it, on somebody's model
            try:
                digest = sha256_file(path)
                known = self._known.setdefault(name, set())
                if digest in known or path.stat().st_size > LARGEST_CACHE:
                    continue
                self._storage.put_file(f"{PREFIX}{name}/{digest}", path)
                waiting = {p.name for p in (self._folder / f"{name}{OTHERS}").glob("*")}
                for old in known - waiting:
                    self._storage.delete(f"{PREFIX}{name}/{old}")
                self._known[name] = {digest, *(known & waiting)}
            except _TROUBLE as error:
                log.warning("shared_cache_not_stored", cache=name, reason=str(error))

    def _local(self, name: str) -> str | None:
        path = self._folder / f"{name}{CACHE}"
        return sha256_file(path) if path.is_file() and not path.is_symlink() else None

    def _stored(self) -> list[tuple[str, str, StoredObject]]:
        """(name, digest, object), the newest states first."""
        found: list[tuple[str, str, StoredObject]] = []
        counts: dict[str, int] = {}
        for item in sorted(self._storage.list(PREFIX), key=lambda o: o.modified_at, reverse=True):
            match = _KEY.fullmatch(item.key)
            if match and counts.setdefault(match[1], 0) < _MOST:
                counts[match[1]] += 1
                found.append((match[1], match[2], item))
        return found
