"""Signed sidecars of engines that are native code: loading one from elsewhere runs what its author wrote, so only what
this installation built is ever loaded. The HMAC-SHA256 (RFC 2104) covers the sidecar, which holds the engine's SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers import installation

_LARGEST_SIDECAR = 16 << 20


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_key() -> bytes:
    """The key to sign with; raises StageFailure(`engine_key_missing`)."""
    key = installation.current().engine_key
    if key is None:
        raise StageFailure(
            "engine_key_missing",
            "This process was handed no key to sign engines with, and unsigned native code is never loaded.",
            FailureKind.INFRASTRUCTURE,
            remedy="Start the stage through a worker, which holds the installation's key.",
            cacheable=False,
        )
    return key


def write(sidecar: Path, body: Mapping[str, Any]) -> None:
    """Sign and write. Raises StageFailure(`engine_key_missing`)."""
    signed = {**body, "hmac_sha256": _signature(require_key(), body)}
    sidecar.write_text(json.dumps(signed, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read(sidecar: Path, engine_format: str, what: str) -> dict[str, Any]:
    """The sidecar without its signature, unchanged since this installation wrote it. `what`: is native code, e.g. "a
    plan". Raises StageFailure: `engine_untrusted`, `engine_key_missing`."""
    body = None
    if sidecar.stat().st_size <= _LARGEST_SIDECAR:
        try:
            body = json.loads(sidecar.read_bytes())
        except (ValueError, RecursionError):
            body = None
    if not isinstance(body, dict) or body.get("format") != engine_format:
        raise untrusted(what, "its sidecar is not one that this service wrote")
    signature, key = str(body.pop("hmac_sha256", "")), require_key()
    try:
        signed = hmac.compare_digest(signature.encode(), _signature(key, body).encode())
    except (ValueError, RecursionError):  # NaN, a lone surrogate, lists in lists: not what was written here
        signed = False
    if not signed:
        raise untrusted(what, "its signature does not fit: another installation built it, or the sidecar was changed")
    return body


def untrusted(what: str, why: str) -> StageFailure:
    return StageFailure(
        "engine_untrusted",
        f"The engine is not loaded, because {what} is native code and {why}.",
        FailureKind.MODEL,
        remedy="Run the job again, so that this installation builds the engine itself.",
        cacheable=False,
    )


def _signature(key: bytes, body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()
