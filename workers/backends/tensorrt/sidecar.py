"""The sidecar of a TensorRT plan, its signature, and the checks before a plan is loaded.

A plan is native code: loading one from elsewhere runs what its author wrote. So only plans that this installation built
are ever deserialized (`workers.backends.signing`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.backends import signing
from workers.backends.tensorrt.library import TENSORRT, Library
from workers.backends.tensorrt.probe import Gpu, capability

PLAN_FILE = "engine.plan"
SIDECAR_FILE = "engine.json"
FORMAT = "anneal-tensorrt-plan/1"
_WHAT = "a plan"
_REBUILD = "Run the job again on this machine: the engine is then built for what is installed here."


def write_sidecar(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Sign and write the sidecar of `folder / PLAN_FILE`; returns it without the signature."""
    plan = folder / PLAN_FILE
    body = {**facts, "format": FORMAT, "plan_sha256": signing.sha256_of(plan), "plan_bytes": plan.stat().st_size}
    signing.write(folder / SIDECAR_FILE, body)
    return body


def read_verified(folder: Path) -> tuple[dict[str, Any], bytes]:
    """Sidecar and plan, which this installation built, unchanged since: the very bytes that were verified. Raises
    StageFailure: `load_failed`, `engine_untrusted`, `engine_key_missing`."""
    plan, sidecar = folder / PLAN_FILE, folder / SIDECAR_FILE
    if not plan.is_file() or not sidecar.is_file():
        raise StageFailure("load_failed", f"The engine needs the files {PLAN_FILE} and {SIDECAR_FILE}.")
    body = signing.read(sidecar, FORMAT, _WHAT)
    content = plan.read_bytes()
    if not hmac.compare_digest(str(body["plan_sha256"]), hashlib.sha256(content).hexdigest()):
        raise signing.untrusted(_WHAT, "the plan was changed after it was signed")
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


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _incompatible(why: str) -> StageFailure:
    return StageFailure(
        "engine_incompatible",
        f"The engine cannot be loaded here: {why}.",
        FailureKind.MODEL,
        remedy=_REBUILD,
        cacheable=False,
    )
