"""The engine's folder: its files, and the signed sidecar that says what they are and were built for."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.failures import FailureKind, StageFailure
from workers.artifacts import PROGRAM_FILE
from workers.backends import signing
from workers.backends.inductor.options import Form
from workers.graph.interface import INTERFACE_FILE, Interface

PACKAGE_FILE = "model.pt2"
CACHE_FILE = "cache.bin"
SIDECAR_FILE = "engine.json"
FORMAT = "anneal-inductor/1"
_FILES: Mapping[Form, tuple[str, ...]] = {
    "package": (PACKAGE_FILE, INTERFACE_FILE),
    "cache": (PROGRAM_FILE, CACHE_FILE, INTERFACE_FILE),
}
_WHAT = "what Inductor compiles"


@dataclass(frozen=True)
class Sidecar:
    """`order`: the inputs by position. `ranges`: of each by axis, the least and the largest size, None where nothing
    bounds it. `fixed`: outputs that lie in memory of the engine's own and are copied out. `target`: what it was built
    for, under the names of `build.target`."""

    form: Form
    order: tuple[str, ...]
    ranges: Mapping[str, Sequence[Sequence[int | None]]]
    fixed: tuple[str, ...]
    precision: str
    target: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Sign what lies in `folder`. Raises StageFailure(`engine_key_missing`)."""
        files = {name: signing.sha256_of(folder / name) for name in _FILES[self.form]}
        body = {"format": FORMAT, "files": files, **{k: _plain(v) for k, v in vars(self).items()}}
        signing.write(folder / SIDECAR_FILE, body)


def read_verified(folder: Path, form: Form) -> tuple[Sidecar, Interface]:
    """Of an engine that this installation built, unchanged since. Raises StageFailure: `load_failed`,
    `engine_untrusted`, `engine_key_missing`."""
    names = _FILES[form]
    missing = [name for name in (*names, SIDECAR_FILE) if not (folder / name).is_file()]
    if missing:
        raise StageFailure("load_failed", f"The engine has no file {missing[0]}.", remedy="Build the engine again.")
    body = signing.read(folder / SIDECAR_FILE, FORMAT, _WHAT)
    files = body.pop("files")
    for name in names:
        if not hmac.compare_digest(str(files.get(name)), signing.sha256_of(folder / name)):
            raise signing.untrusted(_WHAT, f"{name} was changed after it was signed")
    body.pop("format")
    told = Sidecar(**{**body, "order": tuple(body["order"]), "fixed": tuple(body["fixed"])})
    return told, Interface.read(folder)


def require_compatible(sidecar: Sidecar, here: Mapping[str, Any]) -> None:
    """Raises StageFailure(`engine_incompatible`): compiled code needs the torch, and the instruction set or the GPU,
    that it was compiled for."""
    for name, built in sidecar.target.items():
        known = here.get(name)
        fits = set(built) <= set(known or ()) if isinstance(built, list) else known == built
        if not fits:
            raise StageFailure(
                "engine_incompatible",
                f"The engine cannot be loaded here: it was compiled for {name} {_told(built)}, and this machine has "
                f"{_told(known)}.",
                FailureKind.MODEL,
                remedy="Run the job again on this machine: the engine is then built for what is installed here.",
                cacheable=False,
            )


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value
