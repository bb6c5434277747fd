"""Digests, artifacts and stage keys: content addressing, the one idea of the service.

A stage's key is the SHA-256 of everything that can change its output. The canonical form is JSON with sorted keys,
no white space, UTF-8, and no NaN or Infinity (RFC 8785 without its number rules; options hold no exotic floats).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, order=True)
class FileRef:
    """One stored file: its relative name inside the artifact (in a folder only where several engines lie side by side),
    hex SHA-256 and size in bytes."""

    name: str
    sha256: str
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "size_bytes": self.size_bytes}


@dataclass(frozen=True)
class ArtifactRef:
    """A small folder of stored files, e.g. `model.onnx` and its external data; sorted by name. `kind`: what they are,
    as the stage that made them declares it; it follows from them, so it is no part of what they are told apart by."""

    files: tuple[FileRef, ...]
    kind: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(sorted(self.files)))

    @property
    def digest(self) -> str:
        return digest_of([[f.name, f.sha256] for f in self.files])

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    def to_json(self) -> list[dict[str, Any]]:
        return [f.to_json() for f in self.files]

    @classmethod
    def from_json(cls, data: list[dict[str, Any]]) -> ArtifactRef:
        return cls(tuple(FileRef(f["name"], f["sha256"], f["size_bytes"]) for f in data))


def stage_key(
    *,
    stage: str,
    version: int,
    inputs: Mapping[str, ArtifactRef],
    options: Mapping[str, Any],
    libraries: Mapping[str, str],
    hardware: str | None,
) -> str:
    """The key of one stage call. `hardware` is the fingerprint, or None where the output does not depend on it."""
    return digest_of(
        {
            "stage": stage,
            "version": version,
            "inputs": {name: ref.digest for name, ref in inputs.items()},
            "options": dict(options),
            "libraries": dict(libraries),
            "hardware": hardware,
        }
    )
