"""The timing cache: what TensorRT measured of its tactics, kept between builds.

One file per TensorRT version, GPU and CUDA version, the three that it is valid for, in the installation's cache folder.
Builds that end at the same time merge: the file is read again under a lock before it is replaced. What other machines
found lies in a folder beside it (`workers.pipeline.shared_caches`), and is merged in, too. A cache only saves time and
makes rebuilds alike; one that is missing, damaged or of another kind is left out.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workers import installation
from workers.backends.tensorrt.probe import Gpu

if TYPE_CHECKING:
    import tensorrt


def cache_path(tensorrt: str, gpu: Gpu) -> Path | None:
    """Where the cache for this TensorRT, GPU and CUDA lies; None where the installation has no folder for it."""
    folder = installation.current().cache_dir
    if folder is None:
        return None
    key = hashlib.sha256(f"{tensorrt}\0{gpu.name}\0{gpu.compute_capability}\0{gpu.cuda}".encode()).hexdigest()
    return folder / f"tensorrt-timing-{key[:32]}{installation.CACHE}"


def attach(config: tensorrt.IBuilderConfig, path: Path | None) -> tuple[tensorrt.ITimingCache | None, bool]:
    """Give the build a timing cache, filled from `path` and what lies beside it where that fits; returns it, which must
    outlive the build, and whether it was filled."""
    cache: tensorrt.ITimingCache | None = None
    for file in _all(path):
        other = _parsed(config, _read(file))
        if other is None:
            continue
        if cache is None:
            cache = other
        else:
            cache.combine(other, ignore_mismatch=False)
    if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
        return cache, True
    cache = config.create_timing_cache(b"")
    if cache is not None:
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache, False


def merge(config: tensorrt.IBuilderConfig, path: Path | None) -> dict[str, Any]:
    """Lay what this build measured into `path`, with what lies beside it, which is then removed (of another kind: it
    stays); returns the size and digest of what is stored there."""
    cache = config.get_timing_cache()
    if path is None or cache is None:
        return {"stored": False}
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        done = []
        for file in _all(path):
            other = _parsed(config, _read(file))
            if other is None or cache.combine(other, ignore_mismatch=False):  # what cannot be read is of no use either
                done.append(file)
        content = bytes(memoryview(cache.serialize()))
        if len(content) > installation.LARGEST_CACHE:
            return {"stored": False}
        temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temp.write_bytes(content)
        temp.replace(path)
        for file in done:
            if file != path:
                file.unlink(missing_ok=True)
    return {"stored": True, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _all(path: Path | None) -> list[Path]:
    """The cache of this machine, and those of others that wait to be merged."""
    if path is None:
        return []
    others = sorted(p for p in path.with_suffix(installation.OTHERS).glob("*") if not p.name.startswith("."))
    return [p for p in (path, *others) if p.is_file()]


def _parsed(config: tensorrt.IBuilderConfig, stored: bytes) -> tensorrt.ITimingCache | None:
    if not stored:
        return None
    try:
        return config.create_timing_cache(stored)
    except Exception:  # a damaged file: the build then measures afresh
        return None


def _read(path: Path | None) -> bytes:
    try:
        return path.read_bytes() if path is not None and path.stat().st_size <= installation.LARGEST_CACHE else b""
    except OSError:
        return b""


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
