"""Workers of one kind: each would answer a call with the same bytes, under the same keys. Only they help each other."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.domain.artifact_key import digest_of
from workers import kernel
from workers.candidates import Candidate
from workers.libraries import installed_versions

_CALLS = 2  # how requests are written down: to be raised when what was written before is read otherwise
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Kind:
    """`plain`: of this machine's hardware, stages, backends and libraries. `signed`: and of the key that engines of
    native code are signed with; another one's are of no use here."""

    plain: str
    signed: str

    @property
    def both(self) -> tuple[str, str]:
        return self.plain, self.signed

    def of(self, candidates: Iterable[Candidate]) -> str:
        """The one that a call on these asks for."""
        known = kernel.backends()
        return self.signed if any(c.backend in known and known[c.backend].signed for c in candidates) else self.plain


def kind_of(backends: Sequence[kernel.BackendInfo], hardware: Mapping[str, Any], fingerprint: str, key_id: str) -> Kind:
    """`backends`: that this worker offers; `key_id`: of the installation's signing key."""
    stages = {
        name: [stage.version, installed_versions(n for n in (*stage.libraries, stage.distribution) if n)]
        for name, stage in sorted(kernel.stages().items())
    }
    engines = {}
    for name in sorted(b.name for b in backends):
        backend = kernel.backends()[name]
        versions = installed_versions(n for n in (*backend.libraries, backend.distribution) if n)
        engines[name] = [versions, dict(backend.facts_of_build(hardware))]
    plain = digest_of([_CALLS, fingerprint, stages, engines])
    return Kind(plain, digest_of([plain, key_id]))


def machine() -> str:
    """Tells this machine from others, from inside a container, too."""
    try:
        return _BOOT.read_text().strip()[:64]
    except OSError:
        return socket.gethostname()[:64]
