"""The sidecar of a TensorRT plan, its signature, and the checks before a plan is loaded.

A plan is native code: loading one from elsewhere runs what its author wrote. So only plans that this installation built
are ever deserialized. The HMAC-SHA256 (RFC 2104) covers the sidecar, and the sidecar holds the plan's SHA-256.
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
from workers.backends.tensorrt.library import TENSORRT, Library
from workers.backends.tensorrt.probe import Gpu, capability

PLAN_FILE = "engine.plan"
SIDECAR_FILE = "engine.json"
FORMAT = "anneal-tensorrt-plan/1"
_LARGEST_SIDECAR = 16 << 20
_REBUILD = "Run the job again on this machine: the engine is then built for what is installed here."


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_key() -> bytes:
    """The key to sign with; raises StageFailure(`engine_key_missing`)."""
    key = installation.current().engine_key
    if key is None:
        raise StageFailure(
            "engine_key_missing",
            "This process was handed no key to sign engines with, and an unsigned plan is never loaded.",
            FailureKind.INFRASTRUCTURE,
            remedy="Start the stage through a worker, which holds the installation's key.",
            cacheable=False,
        )
    return key


def write_sidecar(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sign and write the sidecar of `folder / PLAN_FILE`; returns it without the signature."""
    key = require_key()
    plan = folder / PLAN_FILE
    body = {**facts, "format": FORMAT, "plan_sha256": sha256_of(plan), "plan_bytes": plan.stat().st_size}
    signed = {**body, "hmac_sha256": _signature(key, body)}
    (folder / SIDECAR_FILE).write_text(json.dumps(signed, indent=1, sort_keys=True, allow_nan=False) + "\n")
    return body


def read_verified(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Sidecar and plan, which this installation built, unchanged since: the very bytes that were verified. Raises
    StageFailure: `load_failed`, `engine_untrusted`, `engine_key_missing`."""
    plan, sidecar = folder / PLAN_FILE, folder / SIDECAR_FILE
    if not plan.is_file() or not sidecar.is_file():
        raise StageFailure("load_failed", f"The engine needs the files {PLAN_FILE} and {SIDECAR_FILE}.")
    body = None
    if sidecar.stat().st_size <= _LARGEST_SIDECAR:
        try:
            body = json.loads(sidecar.read_bytes())
        except (ValueError, RecursionError):
            body = None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise _untrusted("its sidecar is not one that this service wrote")
    signature, key = str(body.pop("hmac_sha256", "")), require_key()
    try:
        signed = hmac.compare_digest(signature.encode(), _signature(key, body).encode())
    except (ValueError, RecursionError):  # NaN, a lone surrogate, lists in lists: not what was written here
        signed = False
    if not signed:
        raise _untrusted("its signature does not fit: another installation built it, or the sidecar was changed")
    content = plan.read_bytes()
    if not hmac.compare_digest(str(body["plan_sha256"]), hashlib.sha256(content).hexdigest()):
        raise _untrusted("the plan was changed after it was signed")
    return body, content


def check_compatible(body: Mapping[str, Any], tensorrt: str, gpu: Gpu, library: Library = TENSORRT) -> None:
    """Whether this TensorRT on this GPU may load the plan; raises StageFailure(`engine_incompatible`).

    A plan needs the very version that built it, unless it was built version-compatible: then any later one of at least
    the same major version. It needs the same GPU model (NVIDIA's rule without hardware compatibility), the same compute
    capability, or Ampere and later, as it was built; and a driver of the same branch or a later one. A plan of TensorRT
    for RTX is compiled where it is loaded: it needs the compute capability that it was built for, and no more.
    """
    built = str(body["tensorrt"])
    made_by = str(body.get("library", TENSORRT.name))
    if made_by != library.name:
        raise _incompatible(f"it was built by {made_by}, which is another library than {library.name}")
    if built != tensorrt and not (body["version_compatible"] and _version(tensorrt) >= _version(built)):
        raise _incompatible(f"it was built with TensorRT {built}, and this machine has {tensorrt}")
    there, here = body["gpu"], gpu
    level = "same_compute_capability" if library.compiles_when_loaded else str(body["hardware_compatibility"])
    same = there["compute_capability"] == here.compute_capability
    if level == "ampere_plus":
        fits = capability(here.compute_capability) >= (8, 0)
    elif level == "same_compute_capability":
        fits = same
    else:
        fits = same and there["name"] == here.name
    if not fits:
        raise _incompatible(
            f"it was built on {there['name']} (compute capability {there['compute_capability']}), and this machine has "
            f"{here.name} ({here.compute_capability})"
        )
    if library.compiles_when_loaded:
        return
    if _version(here.cuda)[:1] < _version(str(there["cuda"]))[:1]:
        raise _incompatible(f"it was built for CUDA {there['cuda']}, and this machine's driver knows {here.cuda}")
    known = str(there.get("driver") or "")
    # A newer driver runs what was built beside an older one.
    if known and here.driver and _version(here.driver)[:1] < _version(known)[:1]:
        raise _incompatible(f"it was built beside driver {known}, and this machine has the older {here.driver}")


def _signature(key: bytes, body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hmac.new(key, canonical.encode(), hashlib.sha256).hexdigest()


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _untrusted(why: str) -> StageFailure:
    return StageFailure(
        "engine_untrusted",
        f"The engine is not loaded, because a plan is native code and {why}.",
        FailureKind.MODEL,
        remedy="Run the job again, so that this installation builds the engine itself.",
        cacheable=False,
    )


def _incompatible(why: str) -> StageFailure:
    return StageFailure(
        "engine_incompatible",
        f"The engine cannot be loaded here: {why}.",
        FailureKind.MODEL,
        remedy=_REBUILD,
        cacheable=False,
    )
