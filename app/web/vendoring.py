"""What the pages load from others, kept in the repository: `python -m app.web.vendoring`.

    check     the files are those of the lock (a test does so, too)
    fetch     take them out of the npm packages that the lock names, and compare with its digests
    update    the same, and write the digests anew: after the lock's versions were changed on purpose

Needs npm for all but `check`. The lock, `vendor.json`, names for each package its version and licence, and for each
file where it stands in the package, what it is called here and its SHA-256. Licences are kept beside the files.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LOCK = HERE / "vendor.json"
FOLDER = HERE / "static" / "vendor"


def read_lock() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(LOCK.read_text())
    return found


def faults() -> Iterator[str]:
    """What is not as the lock says: files that are missing, others', or not in it."""
    lock = read_lock()
    wanted = {file["name"]: file["sha256"] for package in lock.values() for file in package["files"].values()}
    there = {path.name for path in FOLDER.iterdir()}
    yield from (f"{name} is not in the lock" for name in sorted(there - set(wanted)))
    for name, sha256 in wanted.items():
        if name not in there:
            yield f"{name} is missing"
        elif _digest((FOLDER / name).read_bytes()) != sha256:
            yield f"{name} has other bytes than the lock says"


def fetch(*, update: bool) -> None:
    """Every file of the lock; `ValueError` where one has another digest, and nothing of its package is written then."""
    lock = read_lock()
    FOLDER.mkdir(exist_ok=True)
    for name, package in lock.items():
        content = _files_of(f"{name}@{package['version']}", list(package["files"]))
        for path, file in package["files"].items():
            digest = _digest(content[path])
            if not update and digest != file["sha256"]:
                raise ValueError(f"{name} {path}: SHA-256 {digest}, the lock says {file['sha256']}")
            file["sha256"] = digest
        for path, file in package["files"].items():
            (FOLDER / file["name"]).write_bytes(content[path])
    if update:
        LOCK.write_text(json.dumps(lock, indent=2) + "\n")


def _files_of(package: str, paths: Sequence[str]) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        packing = ["npm", "pack", "--silent", "--ignore-scripts", package]
        done = subprocess.run(packing, cwd=folder, capture_output=True, text=True, check=True)
        with tarfile.open(Path(folder) / done.stdout.split()[-1]) as archive:
            found = {}
            for path in paths:
                file = archive.extractfile(f"package/{path}")
                if file is None:
                    raise ValueError(f"{package} has no file {path}")
                found[path] = file.read()
            return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str]) -> int:
    if arguments not in (["check"], ["fetch"], ["update"]):
        sys.stderr.write(__doc__ or "")
        return 2
    if arguments != ["check"]:
        fetch(update=arguments == ["update"])
    found = list(faults())
    sys.stderr.write("".join(f"{fault}\n" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
