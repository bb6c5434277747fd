"""What a confined process may reach, as data."""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODES = ("auto", "required", "off")

_ROOT = Path(__file__).resolve().parents[2]

_SYSTEM = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/gnu/store", "/run/opengl-driver",
    "/proc", "/sys",
)  # fmt: skip
# Not all of /etc: keys and passwords lie there, too.
_ETC = (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "passwd", "group", "nsswitch.conf", "hosts",
    "host.conf", "localtime", "timezone", "gai.conf", "protocols", "services", "ssl/openssl.cnf", "pki/tls/openssl.cnf",
    "crypto-policies", "alternatives", "locale.alias", "locale.conf", "mime.types", "os-release", "lsb-release",
    "debian_version", "OpenCL", "nccl.conf", "cufile.json", "nv_tegra_release", "machine-id", "fonts",
)  # fmt: skip
PLAIN_DEVICES = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))


@dataclass(frozen=True)
class Policy:
    """Folders and files by what may be done with them: `read` (and started), `listed`, `inputs` (read only), `own`
    (everything), `shared` (written to, no links), `folders` (empty ones are made and removed), `devices`. What is in
    none of them is out of reach. `loopback`: TCP on this machine; without it there is no network. `packets`: local
    sockets of that kind. `tmp`: a folder of its own that is /tmp for it, where the machine has namespaces and nothing
    else that it reaches lies there. `names_threads`: as CUDA does, which writes below /proc for it and ends where it
    cannot. `processes`: whether any may be started; `counted`: each is asked for. `shared_memory_bytes`: of /dev/shm,
    which is its own where that can be; 0 = none."""

    read: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    devices: tuple[str, ...] = PLAIN_DEVICES
    loopback: bool = False
    packets: bool = False
    tmp: str = ""
    names_threads: bool = False
    processes: bool = True
    counted: bool = False
    shared_memory_bytes: int = 0


@dataclass(frozen=True)
class Host:
    """How an installation confines: `mode`, one of `MODES`; `read`: what its processes read beside the system's and
    Python's own files; `hidden`: what they never do, though it may lie below one of those."""

    mode: str = "auto"
    read: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"mode": self.mode, "read": [*self.read], "hidden": [*self.hidden]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Host:
        return cls(data["mode"], tuple(data["read"]), tuple(data["hidden"]))


@dataclass
class Grounds:
    """What every confined process of this one may read, found once: the system, Python, the packages."""

    read: list[str] = field(default_factory=list)
    listed: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, host: Host) -> Grounds:
        found = cls()
        hidden = [*map(Path, host.hidden)]
        wanted = [*_SYSTEM, *(f"/etc/{name}" for name in _ETC), *_python(), *_searched(), *host.read]
        for path in dict.fromkeys(Path(p).resolve() for p in wanted):
            if path != Path("/"):
                found._add(path, hidden)
        for module in _modules(found.read):
            found._add(module, hidden)
        # A checkout is imported from by programs that are started, too, and Python lists what it imports from.
        found.listed.append(str(_ROOT))
        return found

    def _add(self, path: Path, hidden: Iterable[Path]) -> None:
        """All of it; around what is hidden, all that lies beside that. Its name may still be seen."""
        if any(path == secret for secret in hidden):
            return
        if not any(secret.is_relative_to(path) for secret in hidden):
            self.read.append(str(path))
            return
        self.listed.append(str(path))
        for entry in _entries(path):
            self._add(entry, hidden)


def _python() -> Iterator[str]:
    """The interpreter, its library, and what is imported from: of a checkout the packages alone, for what else lies
    there may be anybody's."""
    yield from (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, str(Path(sys.executable).parent))
    installed = {str(Path(sysconfig.get_path(name)).resolve()) for name in ("purelib", "platlib")}
    for name in sys.path:
        if not Path(name).is_absolute():
            continue
        if Path(name).resolve() == _ROOT and str(_ROOT) not in installed:
            yield from (str(_ROOT / package) for package in ("app", "workers"))
        else:
            yield name


def _searched() -> Iterator[str]:
    """Where programs and libraries are looked for."""
    for variable in ("PATH", "LD_LIBRARY_PATH"):
        yield from (name for name in os.environ.get(variable, "").split(os.pathsep) if Path(name).is_absolute())


def _modules(read: Iterable[str]) -> Iterator[Path]:
    """Packages that are imported and lie elsewhere, as those of an import hook do."""
    known = tuple(f"{path}{os.sep}" for path in read)
    for name, module in [*sys.modules.items()]:
        file = getattr(module, "__file__", None)
        if file and "." not in name and not file.startswith(known):
            path = Path(file)
            yield (path.parent if path.stem == "__init__" else path).resolve()
        elif file is None and "." not in name:  # a package without a file of its own
            yield from (Path(p).resolve() for p in getattr(module, "__path__", ()) if not f"{p}/".startswith(known))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
