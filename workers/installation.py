"""What belongs to this installation and not to any result: the key that signs engines, and the folder of timing caches.

No stage key holds any of it. The worker hands it to the child of a stage call beside the request; a process that was
handed nothing has none, and then builds no engine that is native code.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KEY_BYTES = 32
CACHE, OTHERS = ".cache", ".others"  # a cache's file, and the folder beside it with what other machines found
LARGEST_CACHE = 512 << 20


@dataclass(frozen=True)
class Installation:
    """`engine_key`: signs and verifies engines that are native code, one key per tenant. `cache_dir`: writable, kept
    between jobs, shared by the workers of a machine."""

    engine_key: bytes | None = None
    cache_dir: Path | None = None

    @property
    def key_id(self) -> str:
        """Tells keys apart and nothing else: what another key signed is of no use here, and is built again."""
        return hashlib.sha256(b"id\0" + (self.engine_key or b"")).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        return {
            "engine_key": self.engine_key.hex() if self.engine_key else None,
            "cache_dir": str(self.cache_dir) if self.cache_dir else None,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Installation:
        key, folder = data.get("engine_key"), data.get("cache_dir")
        return cls(bytes.fromhex(key) if key else None, Path(folder) if folder else None)


_current = Installation()


def current() -> Installation:
    """What this process was handed."""
    return _current


def use(installation: Installation) -> None:
    """Hand `installation` to this process and to what it forks."""
    global _current  # noqa: PLW0603  (set once, at the start of a child)
    _current = installation


@contextmanager
def using(installation: Installation) -> Iterator[None]:
    """`use` for the length of a block."""
    before = _current
    use(installation)
    try:
        yield
    finally:
        use(before)


def load_or_make_key(path: Path) -> bytes:
    """The installation's signing key; made (32 random bytes, readable by the owner only) where there is none yet.

    Workers on several machines that share engines need the same file. Raises `ValueError` for a file of another size.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with suppress(FileExistsError):
        if not path.exists():
            descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(os.urandom(KEY_BYTES))
            try:
                os.link(temp, path)  # unlike a rename it never replaces the key of a worker that was faster
            finally:
                temp.unlink()
    key = path.read_bytes()
    if len(key) != KEY_BYTES:
        raise ValueError(f"{path.name} holds {len(key)} bytes, a key has {KEY_BYTES}")
    return key


def key_for_tenant(installation_key: bytes, tenant_id: str) -> bytes:
    """The key that one tenant's engines are signed with: a stage that a hostile model took over signs for no other."""
    return hmac.new(installation_key, b"engine\0" + tenant_id.encode(), hashlib.sha256).digest()
